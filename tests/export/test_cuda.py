"""On a GPU: ONNX Runtime's CUDA provider runs the custom form by the native library."""

from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
onnx = pytest.importorskip("onnx", reason="extra 'onnx' is not installed")
ort = pytest.importorskip("onnxruntime", reason="extra 'onnx' is not installed")
pytest.importorskip("triton", reason="extra 'triton' is not installed")

from tsa_compile.export import native  # noqa: E402
from tsa_compile.export.aot_kernels import Form  # noqa: E402
from tsa_compile.export.body import Variant  # noqa: E402

CUDA = "CUDAExecutionProvider"
CASES = [  # dtype, head dims, masked, form, tolerance; the second takes the warp-specialised kernel on Hopper
    (torch.float32, 16, 32, True, "strip", 2e-4),
    (torch.float16, 64, 64, False, "paper", 5e-3),
    (torch.float16, 128, 128, False, "strip", 5e-3),
]


@pytest.fixture(scope="module")
def library():
    if CUDA not in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA provider: pip install onnxruntime-gpu")
    forms = [Form.of(dtype, dim, v_dim, 16, masked, form == "strip") for dtype, dim, v_dim, masked, form, _ in CASES]
    return native.build_library(forms, [torch.cuda.get_device_capability()])


def session(model, library, options=None):
    options = options or ort.SessionOptions()
    options.register_custom_ops_library(str(library))
    made = ort.InferenceSession(model.SerializeToString(), options, providers=[CUDA, "CPUExecutionProvider"])
    assert made.get_providers()[0] == CUDA
    return made


@pytest.mark.parametrize(("dtype", "dim", "v_dim", "masked", "form", "atol"), CASES, ids=["fp32", "fp16-64", "fp16-128"])
def test_the_cuda_kernel_equals_the_reference(site, library, dtype, dim, v_dim, masked, form, atol):
    settings = getattr(site, form)
    node = site.node(Variant(masked, True), settings)
    node.overload = ""
    runner = session(site.model([node], [], masked, dtype), library)
    for batch, q_len, k_len in [(1, 1, 1), (2, 48, 48), (3, 49, 49), (2, 513, 513), (2, 40, 900), (1, 3000, 3000)]:
        q, k, v = site.operands(batch, q_len, k_len, dim=dim, v_dim=v_dim, dtype=dtype)
        mask = site.ragged_mask(batch, k_len) if masked else None
        assert site.difference(runner, q, k, v, mask, settings) < atol, (batch, q_len, k_len)


def test_the_node_runs_on_the_gpu(site, library, tmp_path):
    from tsa_compile.bench.onnx_cuda import placement

    node = site.node(Variant(False, True), site.paper)
    node.overload = ""
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    runner = session(site.model([node], [], False, torch.float16), library, options)
    site.run(runner, *site.operands(1, 300, 300, dim=64, v_dim=64, dtype=torch.float16))
    nodes, _ = placement(Path(runner.end_profiling()))
    assert list(nodes) == [CUDA]
    assert list(nodes[CUDA]) == ["TokenSparseAttention"]


def test_a_form_that_was_not_built_is_named(site, library):
    node = site.node(Variant(False, True), site.paper)
    node.overload = ""
    runner = session(site.model([node], [], False, torch.float32), library)
    with pytest.raises(Exception, match=r"node 'site_out': .*without kernels for float32, head dims 64 and 64"):
        site.run(runner, *site.operands(1, 60, 60, dim=64, v_dim=64))
