"""The portable body against the operator's reference, on ONNX Runtime's CPU provider."""

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="extra 'onnx' is not installed")
ort = pytest.importorskip("onnxruntime", reason="extra 'onnx' is not installed")
pytest.importorskip("onnxscript", reason="extra 'onnx' is not installed")

import tsa_compile.kernels.ops  # noqa: E402, F401  (registers torch.ops.tsa)
from tsa_compile.export.body import DOMAIN, DOMAIN_VERSION, Variant, function  # noqa: E402

SCALE = 0.25
PAPER = {"coverage": 0.3, "window": 16, "pool": 7, "min_tokens": 32, "strip_window": 0, "strip_sinks": 0, "heavy": 0}
STRIP = {**PAPER, "strip_window": 24, "strip_sinks": 4, "heavy": 20}
ELEMENT = {torch.float32: 1, torch.float16: 10}
VARIANTS = [Variant(m, s, t) for t in ("onnxruntime", "tensorrt") for m in (False, True) for s in (False, True)]


def one_node(variant, settings, dtype=torch.float32, opset=21):
    """A model of one node and its body."""
    import onnx_ir

    values = {
        **settings,
        "scale": SCALE,
        "coverage": onnx.numpy_helper.from_array(np.array(settings["coverage"])),
        "coverage_q56": round(settings["coverage"] * 2**56),
    }
    inputs = ["q", "k", "v", *(["key_mask"] if variant.masked else [])]
    domain, name, overload = variant.identifier
    node = onnx.helper.make_node(
        name, inputs, ["out"], name="site", domain=domain, **{a: values[a] for a in variant.attributes}
    )
    node.overload = overload
    shapes = {
        "q": ["B", "H", "Lq", "D"],
        "k": ["B", "Hk", "Lk", "D"],
        "v": ["B", "Hk", "Lk", "Dv"],
        "key_mask": ["B", "Lk"],
    }
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [info(n, 9 if n == "key_mask" else ELEMENT[dtype], shapes[n]) for n in inputs],
        [info("out", ELEMENT[dtype], ["B", "H", "Lq", "Dv"])],
    )
    imports = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    body = onnx_ir.to_proto(function(variant, opset))
    return onnx.helper.make_model(graph, opset_imports=imports, functions=[body], ir_version=10)


def session(model):
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def operands(batch, q_len, k_len, heads=4, kv_heads=2, dim=16, v_dim=24, dtype=torch.float32):
    q = 2 * torch.randn(batch, heads, q_len, dim)
    k = 2 * torch.randn(batch, kv_heads, k_len, dim)
    return tuple(x.to(dtype) for x in (q, k, torch.randn(batch, kv_heads, k_len, v_dim)))


def ragged_mask(batch, k_len):
    """Holes in row 0, left padding in row 1, right padding in row 2."""
    mask = torch.ones(batch, k_len, dtype=torch.bool)
    mask[0] = torch.rand(k_len) > 0.25
    mask[0, -1] = True
    if batch > 1:
        mask[1, : k_len // 2] = False
    if batch > 2:
        mask[2, k_len - k_len // 3 :] = False
    return mask


def difference(runner, q, k, v, mask, s):
    feed = {"q": q.numpy(), "k": k.numpy(), "v": v.numpy(), **({} if mask is None else {"key_mask": mask.numpy()})}
    out = torch.from_numpy(runner.run(None, feed)[0]).float()
    selection = (SCALE, s["coverage"], s["window"], s["pool"], s["min_tokens"])
    strip = (s["strip_window"], s["strip_sinks"], s["heavy"])
    expected = torch.ops.tsa.token_sparse_attention(q, k, v, mask, *selection, *strip, "reference").float()
    assert out.shape == expected.shape
    return (out - expected).abs().max().item()


def assert_zero(runner, q, k, v, mask):
    assert not runner.run(None, {"q": q.numpy(), "k": k.numpy(), "v": v.numpy(), "key_mask": mask.numpy()})[0].any()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v.target}-{v.name or 'paper'}")
def test_equals_the_reference_at_any_batch_and_length(variant):
    settings = STRIP if variant.strip else PAPER
    runner = session(one_node(variant, settings))
    for batch, q_len, k_len in [
        (1, 1, 1),
        (2, 7, 7),
        (3, 48, 48),
        (2, 49, 49),
        (3, 513, 513),
        (2, 40, 200),
        (3, 60, 130),
        (1, 5, 130),
    ]:
        q, k, v = operands(batch, q_len, k_len)
        mask = ragged_mask(batch, k_len) if variant.masked else None
        assert difference(runner, q, k, v, mask, settings) < 2e-5, (batch, q_len, k_len)


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_ties_go_to_the_lowest_positions(target):
    runner = session(one_node(Variant(False, False, target), PAPER))
    q, k, v = operands(1, 200, 200)
    k[:, :, 20:150] = k[:, :, 20:21]  # equal keys, equal scores; more than are kept
    assert difference(runner, q, k, v, None, PAPER) < 2e-5


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_scores_that_underflow_to_zero_are_ties(target):
    runner = session(one_node(Variant(False, False, target), {**PAPER, "coverage": 0.001}))
    q, k, v = operands(2, 300, 300)
    assert difference(runner, 40 * q, k, v, None, {**PAPER, "coverage": 0.001}) < 2e-5


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("coverage", [0.0, 1e-9, 0.005, 0.9999])
def test_coverage_from_nothing_to_almost_everything(target, coverage):
    settings = {**PAPER, "coverage": coverage}
    runner = session(one_node(Variant(False, False, target), settings))
    assert difference(runner, *operands(2, 260, 260), None, settings) < 2e-5


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_rows_without_a_real_query_are_zero(target):
    runner = session(one_node(Variant(True, True, target), STRIP))
    mask = torch.ones(2, 120, dtype=torch.bool)
    mask[0] = False
    mask[1, 80:] = False  # keys, but no query
    assert_zero(runner, *operands(2, 40, 120), mask)


@pytest.mark.parametrize(
    "strip",
    [
        {"strip_window": 0, "strip_sinks": 4, "heavy": 0},
        {"strip_window": 0, "strip_sinks": 0, "heavy": 8},
        {"strip_window": 1, "strip_sinks": 0, "heavy": 0},
        {"strip_window": 64, "strip_sinks": 100, "heavy": 32},
    ],
    ids=str,
)
def test_every_form_of_strip(strip):
    settings = {**PAPER, **strip}
    runner = session(one_node(Variant(False, True), settings))
    for q_len, k_len in [(3, 3), (150, 150), (33, 90)]:
        assert difference(runner, *operands(2, q_len, k_len), None, settings) < 2e-5


@pytest.mark.parametrize("heads", [(1, 1), (6, 3), (8, 1)], ids=str)
def test_grouped_query_heads(heads):
    runner = session(one_node(Variant(False, False), PAPER))
    assert difference(runner, *operands(1, 120, 120, *heads), None, PAPER) < 2e-5


def test_float16_stays_within_its_precision():
    runner = session(one_node(Variant(False, True), STRIP, torch.float16))
    assert difference(runner, *operands(2, 130, 130, dtype=torch.float16), None, STRIP) < 1e-2


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v.target}-{v.name or 'paper'}")
@pytest.mark.parametrize("opset", [21, 23])
def test_checker_and_strict_shape_inference_pass(variant, opset):
    model = one_node(variant, STRIP, opset=opset)
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, strict_mode=True, check_type=True, data_prop=True)


def test_the_tensorrt_body_has_no_sort_and_no_float64():
    nodes = list(function(Variant(True, True, "tensorrt")).all_nodes())
    assert not {"TopK", "NonZero", "Unique"} & {n.op_type for n in nodes}
    assert not [n for n in nodes if n.op_type == "Cast" and n.attributes["to"].as_int() == 11]


def test_two_variants_live_in_one_model():
    both = [one_node(Variant(False, s), STRIP) for s in (False, True)]
    both[0].graph.node[0].name = both[0].graph.node[0].output[0] = "first"
    both[0].graph.node.append(both[1].graph.node[0])
    both[0].graph.output.insert(0, both[0].graph.output[0])
    both[0].graph.output[0].name = "first"
    both[0].functions.append(both[1].functions[0])
    q, k, v = operands(1, 90, 90)
    paper, completed = session(both[0]).run(None, {"q": q.numpy(), "k": k.numpy(), "v": v.numpy()})
    assert (paper == 0).all(-1).any()
    assert not (completed == 0).all(-1).any()
