"""The portable body against the operator's reference, on ONNX Runtime's CPU provider."""

import pytest
import torch

onnx = pytest.importorskip("onnx", reason="extra 'onnx' is not installed")
ort = pytest.importorskip("onnxruntime", reason="extra 'onnx' is not installed")
pytest.importorskip("onnxscript", reason="extra 'onnx' is not installed")

from tsa_compile.export.onnx_model.node import Variant, function  # noqa: E402

VARIANTS = [Variant(m, s, t) for t in ("onnxruntime", "tensorrt") for m in (False, True) for s in (False, True)]
TARGETS = ("onnxruntime", "tensorrt")


def session(model):
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v.target}-{v.name or 'paper'}")
def test_equals_the_reference_at_any_batch_and_length(site, variant):
    settings = site.strip if variant.strip else site.paper
    runner = session(site.portable(variant, settings))
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
        q, k, v = site.operands(batch, q_len, k_len)
        mask = site.ragged_mask(batch, k_len) if variant.masked else None
        assert site.difference(runner, q, k, v, mask, settings) < 2e-5, (batch, q_len, k_len)


@pytest.mark.parametrize("target", TARGETS)
def test_ties_go_to_the_lowest_positions(site, target):
    runner = session(site.portable(Variant(False, False, target), site.paper))
    q, k, v = site.operands(1, 200, 200)
    k[:, :, 20:150] = k[:, :, 20:21]  # equal keys, equal scores; more than are kept
    assert site.difference(runner, q, k, v, None, site.paper) < 2e-5


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("target", TARGETS)
def test_a_score_that_is_not_finite_counts_as_zero(site, target, value):
    runner = session(site.portable(Variant(False, True, target), site.strip))
    assert site.difference_beside_a_bad_head(runner, site.strip, value) < 2e-5


@pytest.mark.parametrize("target", TARGETS)
def test_scores_that_underflow_to_zero_are_ties(site, target):
    runner = session(site.portable(Variant(False, False, target), {**site.paper, "coverage": 0.001}))
    q, k, v = site.operands(2, 300, 300)
    assert site.difference(runner, 40 * q, k, v, None, {**site.paper, "coverage": 0.001}) < 2e-5


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("coverage", [0.0, 1e-9, 0.005, 0.9999])
def test_coverage_from_nothing_to_almost_everything(site, target, coverage):
    settings = {**site.paper, "coverage": coverage}
    runner = session(site.portable(Variant(False, False, target), settings))
    assert site.difference(runner, *site.operands(2, 260, 260), None, settings) < 2e-5


@pytest.mark.parametrize("target", TARGETS)
def test_rows_without_a_real_query_are_zero(site, target):
    runner = session(site.portable(Variant(True, True, target), site.strip))
    mask = torch.ones(2, 120, dtype=torch.bool)
    mask[0] = False
    mask[1, 80:] = False  # keys, but no query
    assert not site.run(runner, *site.operands(2, 40, 120), mask).any()


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
def test_every_form_of_strip(site, strip):
    settings = {**site.paper, **strip}
    runner = session(site.portable(Variant(False, True), settings))
    for q_len, k_len in [(3, 3), (150, 150), (33, 90)]:
        assert site.difference(runner, *site.operands(2, q_len, k_len), None, settings) < 2e-5


@pytest.mark.parametrize("heads", [(1, 1), (6, 3), (8, 1)], ids=str)
def test_grouped_query_heads(site, heads):
    runner = session(site.portable(Variant(False, False), site.paper))
    assert site.difference(runner, *site.operands(1, 120, 120, *heads), None, site.paper) < 2e-5


@pytest.mark.parametrize("strip", [False, True], ids=["paper", "completed"])
@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((1, 3, 80, 16), (1, 2, 80, 16), (1, 2, 80, 16)),
        ((1, 4, 90, 16), (1, 2, 80, 16), (1, 2, 80, 16)),
        ((1, 4, 80, 16), (1, 2, 80, 12), (1, 2, 80, 16)),
        ((1, 4, 80, 16), (1, 2, 80, 16), (1, 2, 70, 16)),
        ((2, 4, 80, 16), (1, 2, 80, 16), (1, 2, 80, 16)),
    ],
    ids=["heads", "more queries than keys", "head dim", "length of v", "batch"],
)
def test_operands_that_do_not_fit_are_refused_by_name(site, strip, q, k, v):
    settings = site.strip if strip else site.paper
    runner = session(site.portable(Variant(False, strip), settings))
    with pytest.raises(Exception, match=r"running (Reshape|ConstantOfShape) node.*_TokenSparseAttention_"):
        site.run(runner, *map(torch.zeros, (q, k, v)))


def test_float16_stays_within_its_precision(site):
    runner = session(site.portable(Variant(False, True), site.strip, torch.float16))
    assert site.difference(runner, *site.operands(2, 130, 130, dtype=torch.float16), None, site.strip) < 1e-2


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v.target}-{v.name or 'paper'}")
@pytest.mark.parametrize("opset", [21, 23])
def test_checker_and_strict_shape_inference_pass(site, variant, opset):
    model = site.portable(variant, site.strip, opset=opset)
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, strict_mode=True, check_type=True, data_prop=True)


def test_the_tensorrt_body_has_no_sort_and_no_float64():
    nodes = list(function(Variant(True, True, "tensorrt")).all_nodes())
    assert not {"TopK", "NonZero", "Unique"} & {n.op_type for n in nodes}
    assert not [n for n in nodes if n.op_type == "Cast" and n.attributes["to"].as_int() == 11]


def test_two_variants_live_in_one_model(site):
    import onnx_ir

    variants = Variant(False, False), Variant(False, True)
    nodes = [site.node(variant, site.strip, out) for variant, out in zip(variants, ("paper", "completed"), strict=True)]
    model = site.model(nodes, [onnx_ir.to_proto(function(variant)) for variant in variants], masked=False)
    q, k, v = site.operands(1, 90, 90)
    paper, completed = session(model).run(None, {"q": q.numpy(), "k": k.numpy(), "v": v.numpy()})
    assert (paper == 0).all(-1).any()
    assert not (completed == 0).all(-1).any()
