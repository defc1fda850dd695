"""Engines by Torch-TensorRT for TensorRT-RTX, built on any machine and inspected, not executed: `make test-torch-tensorrt`."""

import importlib.util
import re

import pytest
import torch
from torch import nn

from tests.export.test_aoti import Block
from tests.torch_tensorrt import no_gpu
from tests.torch_tensorrt.models import CASES, LENGTH, MAX_LENGTH, examples, logits

if not importlib.util.find_spec("torch_tensorrt"):
    pytest.skip("torch_tensorrt is not installed: make test-torch-tensorrt", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("engines are inspected without a GPU; with one, test_gpu.py runs them", allow_module_level=True)

PACKAGE = no_gpu.import_torch_tensorrt()

import tsa_compile as tsa  # noqa: E402
from tests.torch_tensorrt.run_network import run_network  # noqa: E402
from tsa_compile import export  # noqa: E402
from tsa_compile.export.torch_tensorrt_lowering.table import LOWERINGS  # noqa: E402

pytestmark = pytest.mark.slow
PRIME = 509  # no other size of the networks equals it
WHOLE = {"require_full_compilation": True, "min_block_size": 1}


@pytest.fixture(scope="module", autouse=True)
def _registered():
    with torch._dynamo.config.patch(capture_scalar_outputs=False):
        assert export.register_torch_tensorrt() is PACKAGE
        export.register_torch_tensorrt()  # a second time changes nothing
        yield


@pytest.fixture(scope="module")
def programs():
    """Each case and its exported program, made once."""
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(0)
            case = CASES[name]()
            with torch.no_grad():
                made[name] = case, export.program(case.model, case.args, policy=case.policy, dynamic_shapes=case.shapes)
        return made[name]

    return get


@pytest.fixture(scope="module")
def networks(programs):
    """Each case's engine for all capabilities and its network, made once."""
    made = {}

    def get(name):
        if name not in made:
            case, program = programs(name)
            made[name] = build(program, case.inputs(PACKAGE), "SM80", "SM89", "SM120")
        return made[name]

    return get


def build(program, inputs, *capabilities):
    """(serialised engine, network) of a program, all of it in one engine."""
    no_gpu.CAPABILITIES[:] = capabilities
    convert = PACKAGE.dynamo.convert_exported_program_to_serialized_trt_engine
    engine = convert(program, arg_inputs=inputs, **WHOLE)
    return engine, no_gpu.NETWORKS[-1].ctx.net


def layers(network):
    return [network.get_layer(i) for i in range(network.num_layers)]


def score_matrices(network, *shapes):
    """Tensors of the network that have the sequence length twice, with inputs of these shapes."""
    for i, shape in enumerate(shapes):
        network.get_input(i).shape = shape
    outputs = [layer.get_output(j) for layer in layers(network) for j in range(layer.num_outputs)]
    return [tuple(t.shape) for t in outputs if tuple(t.shape).count(PRIME) > 1]


def sites(network):
    """Modules whose layers have a running sum, which only our selection has, with their matrix products."""
    names = [layer.name for layer in layers(network)]
    found = sorted({m for n in names for m in re.findall(r"CUMULATIVE.*\[([\w.]+)/", n)})
    return {m: sum("MATRIX_MULTIPLY" in n and f"{m}/" in n for n in names) for m in found}


@pytest.mark.parametrize("capability", ["SM80", "SM89", "SM120"])
def test_a_decoder_is_one_engine_for_each_capability(programs, capability):
    case, program = programs("llama")
    engine, network = build(program, case.inputs(PACKAGE), capability)
    assert len(engine) > 1_000_000
    assert f"{next(iter(sites(network)))}/" in engine.decode("latin-1")  # the engine has the layers' names


@pytest.mark.parametrize("name", CASES)
def test_every_model_is_one_engine_for_all_capabilities(networks, name):
    engine, network = networks(name)
    assert len(engine) > 1_000_000
    found = sites(network)
    assert [re.search(r"layers\.(\d)\.", m)[1] for m in found] == ["0", "1"]
    assert all(products >= 2 for products in found.values())
    if name != "vit":
        assert score_matrices(network, *[(1, PRIME)] * network.num_inputs) == []


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_network_run_layer_by_layer_gives_what_the_program_gives(programs, networks, name):
    """What no graph shows: Torch-TensorRT's converters. The dense model, the control, is further away."""
    case, program = programs(name)
    far = []
    for x in examples(name):
        actual, wanted, dense = (logits(f(*x)) for f in (_run(networks(name)[1]), program.module(), case.model))
        assert (actual - wanted).norm() < 1e-4 * wanted.norm()
        far.append((dense - wanted).norm() > 1e-2 * wanted.norm())
    assert any(far)


def _run(network):
    return lambda *x: run_network(network, x)


class Dense(nn.Module):
    """One dense attention, the control of the inspection."""

    def forward(self, x):
        q = x.unflatten(-1, (4, 16)).transpose(1, 2)
        return (q @ q.transpose(2, 3)).softmax(-1) @ q


def test_the_inspection_sees_dense_attention():
    program = torch.export.export(Dense(), (torch.randn(1, 100, 64),), dynamic_shapes=({1: LENGTH},))
    ranges = PACKAGE.Input(min_shape=(1, 2, 64), opt_shape=(1, 512, 64), max_shape=(1, MAX_LENGTH, 64))
    _, network = build(program, [ranges], "SM89")
    assert score_matrices(network, (1, PRIME, 64))
    assert sites(network) == {}


@pytest.mark.parametrize("name", CASES)
def test_the_partitioner_takes_every_operator(programs, name, tmp_path):
    """`dryrun`: everything but the build. One engine, nothing left to PyTorch; what runs in its place is the lowered graph."""
    case, program = programs(name)
    module, report = program.module(), tmp_path / "report.txt"
    args = tuple(x.clone() for x in case.args)
    for x in args if name != "vit" else ():
        torch._dynamo.mark_dynamic(x, 1, min=2, max=MAX_LENGTH)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="torch_tensorrt", options={"dryrun": str(report), "min_block_size": 1})
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args), module(*args), atol=1e-4, rtol=0)
    text = report.read_text()
    total, supported = re.search(r"consists of (\d+) Total Operators, of which (\d+) operators are supported", text).groups()
    assert total == supported
    assert text.count("TRT Engine #") == 1
    assert "tsa" not in text


def test_the_partitioner_breaks_around_an_operator_without_a_lowering(tmp_path):
    """The control: block selection among kept tokens stays a PyTorch operator between two engines, or is refused by name."""
    x, report = torch.randn(2, 300, 64), tmp_path / "report.txt"
    policy = tsa.TokenSparse(inner=tsa.BlockSparse())
    program = export.program(Block().eval(), (x,), policy=policy)
    torch._dynamo.reset()
    compiled = torch.compile(program.module(), backend="torch_tensorrt", options={"dryrun": str(report), "min_block_size": 1})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), program.module()(x), atol=1e-4, rtol=0)
    assert "tsa.token_block_attention" in report.read_text()
    with pytest.raises(export.ExportError, match="Torch-TensorRT has no form of tsa::token_block_attention"):
        export.torch_tensorrt(Block(), (x,), tmp_path / "m.ep", policy=policy)


def test_every_lowering_is_known_to_the_package():
    from torch_tensorrt.dynamo.lowering import get_decompositions

    assert set(LOWERINGS) <= set(get_decompositions())
