"""TensorRT-RTX parses the portable graph and builds engines on this machine, without a GPU; nothing is executed."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("onnx", reason="extra 'onnx' is not installed")
pytest.importorskip("onnxscript", reason="extra 'onnx' is not installed")

import tsa_compile as tsa
from tsa_compile import export
from tsa_compile.export.tensorrt_engine.engine import Parsed, build_engine, load_runtime

try:
    TRT = load_runtime("tensorrt_rtx")
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

DYNAMIC = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
PAPER = tsa.TokenSparse.paper(coverage=0.3, window=16, min_tokens=32)
COMPLETED = tsa.TokenSparse(coverage=0.3, window=16, min_tokens=32, completion=tsa.Completion(24, 4, 20))
LENGTH = 509  # prime: no other size of the network equals it
PROFILE = {"input_ids": ((1, 2), (1, 512), (2, 8192))}


class Dense(nn.Module):
    """One dense causal attention, the control of the inspection."""

    def forward(self, x):
        q = x.unflatten(-1, (4, 16)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)


def llama(layers=2):
    transformers = pytest.importorskip("transformers", reason="extra 'hf' is not installed")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=128, num_hidden_layers=layers, **sizes))

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model.eval()

        def forward(self, input_ids):
            return self.model(input_ids=input_ids, use_cache=False).logits

    return Logits()


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """A small Llama with the paper's form in one layer and the completed one in the other."""
    path = tmp_path_factory.mktemp("rtx") / "llama.onnx"
    plan = tsa.Plan(PAPER, rules=[(1, "prefill", COMPLETED)])
    export.onnx(llama(), (torch.randint(0, 128, (2, 100)),), path, policy=plan, target="tensorrt", dynamic_shapes=(DYNAMIC,))
    return path


def score_matrices(path, shape):
    """Tensors of the parsed network that have the sequence length twice, with inputs of `shape`."""
    parsed = Parsed(path, TRT)
    parsed.inputs()[0].shape = shape
    found = []
    for i in range(parsed.network.num_layers):
        layer = parsed.network.get_layer(i)
        for j in range(layer.num_outputs):
            size = tuple(layer.get_output(j).shape)
            if size.count(LENGTH) > 1:
                found.append((layer.name, size))
    return found


@pytest.mark.parametrize(
    "capabilities", [("SM80", "SM120"), pytest.param(("SM80", "SM86", "SM89", "SM120"), marks=pytest.mark.slow)]
)
def test_one_engine_for_several_capabilities_holds_both_sites(graph, tmp_path, capabilities):
    path = build_engine(graph, tmp_path / "llama.engine", profile=PROFILE, compute_capabilities=capabilities)
    engine = path.read_bytes().decode("latin-1")
    for layer, variant in [(0, ""), (1, "Completed")]:
        site = f"model.model.layers.{layer}.self_attn.token_sparse_attention (TokenSparseAttention{variant})"
        assert len(re.findall(rf"ONNX Layer: \w*MatMul\w* \| {re.escape(site)}", engine)) >= 2


@pytest.mark.slow  # the engine above holds two of them; one for SM86 alone is built from a model below
@pytest.mark.parametrize("capability", ["SM80", "SM89", "SM120"])
def test_an_engine_for_each_capability(graph, tmp_path, capability):
    path = build_engine(graph, tmp_path / "e", profile=PROFILE, compute_capabilities=[capability])
    assert path.stat().st_size > 1_000_000


def test_no_score_matrix_of_the_full_length(graph, tmp_path):
    assert score_matrices(graph, (1, LENGTH)) == []


def test_the_inspection_sees_dense_attention(tmp_path):
    x = torch.randn(1, 100, 64)
    torch.onnx.export(Dense(), (x,), dynamo=True, dynamic_shapes=({1: DYNAMIC[1]},), opset_version=21, verbose=False).save(
        tmp_path / "dense.onnx"
    )
    assert score_matrices(tmp_path / "dense.onnx", (1, LENGTH, 64))


def test_from_a_model_in_one_call(tmp_path):
    args = (torch.randint(0, 128, (2, 100)),)
    settings = {"profile": PROFILE, "compute_capabilities": ["SM86"]}
    path = export.tensorrt(llama(layers=1), args, tmp_path / "e", policy=PAPER, dynamic_shapes=(DYNAMIC,), **settings)
    assert path.stat().st_size > 1_000_000


def test_requests_that_cannot_be_met(graph, tmp_path):
    out = tmp_path / "e"
    with pytest.raises(ValueError, match=r"tensorrt_rtx builds for .*'SM120'.*not for 'SM90'"):
        build_engine(graph, out, profile=PROFILE, compute_capabilities=["SM90"])
    with pytest.raises(ValueError, match=r"profile is for .*'ids'.*dynamic size are .*'input_ids'"):
        build_engine(graph, out, profile={"ids": PROFILE["input_ids"]})
    with pytest.raises(ValueError, match=r"profile of 'input_ids': \(1, 2, 3\) does not fit"):
        build_engine(graph, out, profile={"input_ids": ((1, 2, 3),) * 3})
    with pytest.raises(ValueError, match="runtime must be one of"):
        build_engine(graph, out, profile=PROFILE, runtime="openvino")
    with pytest.raises(ValueError, match="belong to the export of a model"):
        export.tensorrt(graph, None, out, profile=PROFILE, policy=PAPER)
    assert not out.exists()


def test_damaged_and_missing_files(graph, tmp_path):
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(graph.read_bytes()[:1000])
    with pytest.raises(export.ExportError, match=r"damaged\.onnx: not an ONNX model, or damaged"):
        build_engine(damaged, tmp_path / "e", profile=PROFILE)
    with pytest.raises(export.ExportError, match="no such file"):
        build_engine(tmp_path / "none.onnx", tmp_path / "e", profile=PROFILE)


def test_an_operator_that_the_parser_refuses_is_named(tmp_path):
    import onnx

    info, path = onnx.helper.make_tensor_value_info, tmp_path / "m.onnx"
    node = onnx.helper.make_node("NonZero", ["x"], ["y"], name="which")
    made = onnx.helper.make_graph([node], "g", [info("x", 1, ["n"])], [info("y", 7, [1, "m"])])
    onnx.save(onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10), path)
    with pytest.raises(export.ExportError, match=r"m\.onnx: node 0.*NonZero"):
        build_engine(path, tmp_path / "e", profile={"x": ((1,), (2,), (3,))})


def test_a_graph_for_onnxruntime_is_refused(tmp_path):
    """Its bodies are told apart by overload, which TensorRT's parser ignores, and sort with TopK."""
    export.onnx(
        llama(layers=1),
        (torch.randint(0, 128, (2, 100)),),
        tmp_path / "m.onnx",
        policy=PAPER,
    )
    with pytest.raises(export.ExportError, match='target="tensorrt"'):
        build_engine(tmp_path / "m.onnx", tmp_path / "e", profile=PROFILE)
