"""ProbeSparse on encoders: a tiny ViT and a padded BERT, dense at coverage 0, the reference above it; causal stays dense."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tsa_compile as tsa
from tests.api.tiny import tiny_llama, token_ids
from tests.kernels.flat import key_attention_reference, select_keys_reference
from tsa_compile.plan import as_plan

KEEP_ALL = tsa.ProbeSparse(coverage=0.0, probes=4, min_keys=1)
SPARSE = tsa.ProbeSparse(coverage=0.3, probes=8, min_keys=8)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def tiny(kind: str, implementation: str = "sdpa"):
    """(model, inputs): 2 layers, 4 heads of 16. The BERT batch has a row padded to the right."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    if kind == "vit":
        config = transformers.ViTConfig(**sizes, image_size=64, patch_size=8)
        inputs = {"pixel_values": torch.randn(2, 3, 64, 64)}
        model_class = transformers.ViTModel
    else:
        config = transformers.BertConfig(**sizes, vocab_size=128, max_position_embeddings=128)
        mask = torch.ones(2, 50, dtype=torch.long)
        mask[1, 30:] = 0
        inputs = {"input_ids": token_ids(50, 2), "attention_mask": mask}
        model_class = transformers.BertModel
    config._attn_implementation = implementation
    return model_class(config).eval(), inputs


def real_rows(hidden, inputs):
    mask = inputs.get("attention_mask")
    return hidden if mask is None else hidden[mask.bool()]


@torch.no_grad()
def run(model, inputs):
    return real_rows(model(**inputs).last_hidden_state, inputs)


@pytest.mark.parametrize("kind", ["vit", "bert"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_dense_at_coverage_0(kind, implementation):
    model, inputs = tiny(kind, implementation)
    dense = run(model, inputs)
    tsa.transform(model, KEEP_ALL)
    torch.testing.assert_close(run(model, inputs), dense, atol=1e-4, rtol=1e-4)
    assert [s.replaced for s in tsa.report(model).sites] == [True, True], tsa.report(model)


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_the_reference_above_0(kind, monkeypatch):
    model, inputs = tiny(kind)
    dense = run(model, inputs)
    plain = F.scaled_dot_product_attention

    def reference(q, k, v, attn_mask=None, scale=None, **options):
        if q.dim() == 3:  # the reference's own call
            return plain(q, k, v, scale=scale)
        key_mask = None if attn_mask is None else attn_mask[:, 0, 0].expand(k.shape[0], -1)
        indices, counts = select_keys_reference(q, k, key_mask, scale, SPARSE.coverage, SPARSE.probes, SPARSE.min_keys)
        assert int(counts.min()) < k.shape[2] - 4
        return key_attention_reference(q, k, v, indices, counts, scale)

    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", reference)
        expected = run(model, inputs)
    tsa.transform(model, SPARSE)
    actual = run(model, inputs)
    assert len(tsa.report(model).replaced) == 2
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert (actual - dense).abs().max() > 1e-4


def test_cross_attention_with_other_widths():
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, scale=0.2)

    q, k, v = torch.randn(2, 4, 7, 16), torch.randn(2, 4, 40, 16), torch.randn(2, 4, 40, 24)
    compiled = torch.compile(attend, backend="tsa", options={"policy": SPARSE, "compiler": "eager"})
    with torch.no_grad():
        actual = compiled(q, k, v)
    selection = select_keys_reference(q, k, None, 0.2, SPARSE.coverage, SPARSE.probes, SPARSE.min_keys)
    torch.testing.assert_close(actual, key_attention_reference(q, k, v, *selection, 0.2))
    assert (actual - attend(q, k, v)).abs().max() > 1e-3


def test_causal_attention_stays_dense_with_the_reason():
    report = tsa.explain(tiny_llama(), input_ids=token_ids(40), policy=SPARSE)
    assert {s.reason for s in report.sites} == {"causal mask: ProbeSparse is for bidirectional attention"}


def test_token_sparse_still_leaves_bidirectional_attention_dense():
    model, inputs = tiny("vit")
    assert {s.reason for s in tsa.explain(model, **inputs).sites} == {"bidirectional: no causal mask"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coverage": 1.0}, r"ProbeSparse.coverage must be a number in \[0, 1\), got 1.0"),
        ({"probes": 0}, "ProbeSparse.probes must be an int >= 1, got 0"),
        ({"min_keys": 2.5}, "ProbeSparse.min_keys must be an int >= 1, got 2.5"),
    ],
)
def test_a_bad_value_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        tsa.ProbeSparse(**fields)


def test_it_round_trips():
    assert as_plan(tsa.Plan(SPARSE).to_dict()) == tsa.Plan(SPARSE)
