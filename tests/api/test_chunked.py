"""Chunked prefill and prefix cache: each chunk selects by its own last queries, over all keys so far."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tsa_compile as tsa
from tests.api.tiny import tiny_llama, token_ids
from tests.kernels.flat import select_tokens_reference, sparse_attention_reference
from tsa_compile.frontends import hf

CHUNK, LENGTH = 512, 1536
POLICY = tsa.TokenSparse(coverage=0.3, window=32, min_tokens=64, completion=tsa.Completion(16, 4, 32))


def reference(q, k, v, attn_mask=None, is_causal=False, scale=None, **options):
    """What docs/operators.md says of one chunk, in place of SDPA: queries are the last Lq of the keys in use."""
    if attn_mask is not None:  # the keys of a static cache after the chunk are hidden from all
        used = int(attn_mask.any(-2)[0, 0].sum())
        assert torch.equal(attn_mask[0, 0, :, :used], torch.ones(q.shape[2], used, dtype=torch.bool).tril(used - q.shape[2]))
        k, v = k[:, :, :used], v[:, :, :used]
    elif is_causal:
        k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
    p, c = POLICY, POLICY.completion
    selection = select_tokens_reference(q, k, None, scale, p.coverage, p.window, p.pool, p.min_tokens, c.heavy)
    return sparse_attention_reference(q, k, v, *selection, None, scale, c.window, c.sinks, p.min_tokens + p.window)


def prefill(model, ids, cache):
    with torch.no_grad():
        parts = [
            model(input_ids=ids[:, i : i + CHUNK], past_key_values=cache, use_cache=True).logits for i in range(0, LENGTH, CHUNK)
        ]
    return torch.cat(parts, 1)


def new_cache(kind, model):
    transformers = pytest.importorskip("transformers")
    if kind == "dynamic":
        return transformers.DynamicCache(config=model.config)
    return transformers.StaticCache(config=model.config, max_cache_len=LENGTH + 64)


def prefill_with(function, model, ids, cache):
    """The prefill with `function` in place of SDPA (whose own calls, of rank 3, stay)."""
    plain = F.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", lambda q, *a, **o: (function if q.dim() == 4 else plain)(q, *a, **o))
        return prefill(model, ids, cache)


@pytest.fixture
def model():
    torch._dynamo.reset()
    return tiny_llama(max_position_embeddings=2048)


@pytest.mark.parametrize(
    ("way", "kind"), [("transform", "dynamic"), ("attn_implementation", "dynamic"), ("attn_implementation", "static")]
)
def test_prefill_in_chunks_of_512(model, way, kind):
    ids = token_ids(LENGTH)
    dense = prefill(model, ids, new_cache(kind, model))
    expected = prefill_with(reference, model, ids, new_cache(kind, model))
    if way == "transform":
        tsa.transform(model, POLICY)
    else:
        hf.register(POLICY, "tsa-chunked")
        model.set_attn_implementation("tsa-chunked")
    actual = prefill(model, ids, new_cache(kind, model))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert (actual - dense).abs().max() > 1e-3
    if way == "transform":
        assert not tsa.report(model).dense


def test_transform_leaves_later_chunks_of_a_static_cache_dense(model):
    """A static cache counts its tokens in a tensor, so a trace cannot show where the queries stand."""
    ids = token_ids(LENGTH)
    plain = F.scaled_dot_product_attention

    def first_only(q, k, v, attn_mask=None, **options):
        later = attn_mask is not None and int(attn_mask.any(-2)[0, 0].sum()) > q.shape[2]
        return (plain if later else reference)(q, k, v, attn_mask=attn_mask, **options)

    expected = prefill_with(first_only, model, ids, new_cache("static", model))
    tsa.transform(model, POLICY)
    actual = prefill(model, ids, new_cache("static", model))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    report = tsa.report(model)
    assert len(report.replaced) == 1
    assert all("not understood" in s.reason for s in report.dense)


def test_a_prefix_from_a_cache_changes_nothing_of_the_rest(model):
    """A prompt after a cached prefix gets what the same chunks get one after the other."""
    ids = token_ids(2 * CHUNK)
    tsa.transform(model, POLICY)
    cache = new_cache("dynamic", model)
    with torch.no_grad():
        model(input_ids=ids[:, :CHUNK], past_key_values=cache)
        first = model(input_ids=ids[:, CHUNK:], past_key_values=cache).logits
        cache.crop(-CHUNK)  # the prefix again, for another request
        again = model(input_ids=ids[:, CHUNK:], past_key_values=cache).logits
    assert torch.equal(first, again)
