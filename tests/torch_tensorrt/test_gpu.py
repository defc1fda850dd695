"""Torch-TensorRT on a real GPU: export, run, compare. Run once, on an H200 with releases 2.11: docs/export.md says what came.

On a machine with an RTX card (or any GPU, for the record): `make test-torch-tensorrt`, then
`.venv-torch-tensorrt/bin/python -m pytest -m gpu -s tests/torch_tensorrt/test_gpu.py`.
"""

import importlib.util

import pytest
import torch

from tests.torch_tensorrt.models import CASES, examples, logits

if not importlib.util.find_spec("torch_tensorrt"):
    pytest.skip("torch_tensorrt is not installed: make test-torch-tensorrt", allow_module_level=True)

from tsa_compile import export

pytestmark = pytest.mark.gpu


def build(name, path):
    """Writes the file that Torch-TensorRT makes of the case; returns its program. Expected to fail where RTX has no such GPU."""
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    package = export.register_torch_tensorrt()
    case = CASES[name]()
    model, args = case.model.cuda(), tuple(x.cuda() for x in case.args)
    sites = {"policy": case.policy, "dynamic_shapes": case.shapes}
    whole = {"require_full_compilation": True, "min_block_size": 1, "disable_tf32": True}  # TF32 chooses other tokens
    import tensorrt

    own = "SM{}{}".format(*torch.cuda.get_device_capability())
    known = getattr(tensorrt, "ComputeCapability", None)  # of TensorRT-RTX alone
    print(f"{torch.cuda.get_device_name()}, {own}, tensorrt {tensorrt.__version__}, torch_tensorrt {package.__version__}")
    try:
        export.torch_tensorrt(model, args, path, **sites, **whole, arg_inputs=case.inputs(package))
    except Exception as error:
        if known is None or own in known.__members__:
            raise
        pytest.xfail(f"TensorRT-RTX has no {own}: {error}")
    return export.program(model, args, **sites).module()


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_loaded_engine_equals_the_transformed_model(name, tmp_path):
    expected = build(name, tmp_path / "m.ep")
    loaded = torch.export.load(tmp_path / "m.ep").module()
    for x in examples(name, "cuda"):
        actual, wanted = (logits(module(*x)) for module in (loaded, expected))
        error = (actual - wanted).norm() / wanted.norm()
        print(f"{name} {tuple(x[0].shape)}: relative error {error:.2g}")
        assert error < 1e-2
