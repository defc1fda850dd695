"""How attention is written: each form that is found has a twin that must not match."""

from __future__ import annotations

import math
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.graphs import KEEP_ALL, by_dynamo, by_export
from tsa_compile.passes.pipeline import run_pipeline

B, H, HK, L, D = 2, 4, 2, 11, 16
both = pytest.mark.parametrize("trace", [by_dynamo, by_export])


def qkv(v_dim: int = D, kv_heads: int = HK, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(B, H, L, D, dtype=dtype)
    return q, torch.randn(B, kv_heads, L, D, dtype=dtype), torch.randn(B, kv_heads, L, v_dim, dtype=dtype)


def visible_keys() -> Tensor:
    return torch.arange(L)[None] < torch.tensor([[L], [L - 3]])


def causal(x: Tensor) -> Tensor:
    return torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).tril()


def check_replaced(trace, function, *args):
    outcome = trace(function, *args)
    assert outcome.replaced == [True], outcome.reasons
    torch.testing.assert_close(outcome.result, function(*args), atol=2e-5, rtol=2e-5)


def check_dense(trace, function, *args, reason):
    outcome = trace(function, *args)
    assert outcome.replaced == [False]
    assert reason in outcome.reasons[0]
    torch.testing.assert_close(outcome.result, function(*args))


@both
@pytest.mark.parametrize("scale", [0.3, 1.0, 2])
def test_a_scale_is_kept(trace, scale):
    check_replaced(trace, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale), *qkv(kv_heads=H))


def test_a_scale_that_is_data_is_not_taken():
    def function(q, k, v):
        scores = (q @ k.mT) * q.abs().mean()
        return scores.masked_fill(~causal(scores), -math.inf).softmax(-1) @ v

    check_dense(by_dynamo, function, *qkv(kv_heads=H), reason="scale is not a positive constant")


@both
def test_scale_on_the_query_and_mask_scaled_with_the_scores(trace):
    def function(q, k, v):
        scores = (q * 0.25) @ k.mT
        return scores.masked_fill(~causal(scores), -math.inf).softmax(-1) @ v

    check_replaced(trace, function, *qkv(kv_heads=H))


@both
def test_head_dim_of_values_may_differ(trace):
    check_replaced(
        trace, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), *qkv(v_dim=32)
    )


@both
def test_tiled_heads_are_not_grouped_queries(trace):
    """`repeat` puts head h on h % Hk, grouped queries on h // group: seen through, it would read the wrong heads."""

    def function(q, k, v):
        k, v = k.repeat(1, H // HK, 1, 1), v.repeat(1, H // HK, 1, 1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    check_replaced(trace, function, *qkv())


@both
def test_repeated_keys_with_other_values(trace):
    """K is repeated, V is not: nothing to see through on one side, still exact."""

    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k.repeat_interleave(H // HK, 1), v, is_causal=True)

    q, k, _ = qkv()
    check_replaced(trace, function, q, k, torch.randn(B, H, L, D))


@both
def test_views_in_bshd_order(trace):
    def function(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, L, H * D)

    args = (torch.randn(B, L, H, D) for _ in range(3))
    check_replaced(trace, function, *args)


@both
def test_einsum_in_bshd_order(trace):
    def function(q, k, v):
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(D)
        weights = scores.masked_fill(~causal(scores), -math.inf).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v)

    check_replaced(trace, function, *(torch.randn(B, L, H, D) for _ in range(3)))


@both
def test_softmax_over_queries_is_no_attention(trace):
    def function(q, k, v):
        scores = q @ k.mT
        return scores.masked_fill(~causal(scores), -1e9).softmax(-2) @ v

    outcome = trace(function, *qkv(kv_heads=H))
    assert outcome.replaced == []


def test_linear_attention_is_left_alone():
    outcome = by_dynamo(lambda q, k, v: q.softmax(-1) @ (k.softmax(-2).mT @ v), *qkv(kv_heads=H))
    assert outcome.replaced == []


def test_attention_of_an_unknown_form_is_a_warning():
    def function(q, k, v):  # rank 5
        scores = (q @ k.mT).masked_fill(~causal(q), -math.inf)
        return scores.softmax(-1) @ v

    outcome = by_dynamo(function, *(torch.randn(1, B, H, L, D) for _ in range(3)))
    assert outcome.replaced == []
    assert "not recognised" in outcome.warnings[0]
    assert "rank 5" in outcome.warnings[0]


def test_flex_attention_is_seen_and_left_alone():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def function(q, k, v):
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, L, L, device="cpu")
        return flex_attention(q, k, v, block_mask=mask)

    for run in (function, lambda q, k, v: flex_attention(q, k, v)):
        outcome = by_dynamo(run, *qkv(kv_heads=H))
        assert outcome.replaced == [False]
        assert "flex attention" in outcome.reasons[0]
        assert outcome.warnings == []


def test_dropout_stays_dense():
    outcome = by_dynamo(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5, is_causal=True), *qkv(kv_heads=H))
    assert outcome.replaced == [False]
    assert "dropout" in outcome.reasons[0]


def test_one_query_is_decoding():
    q, k, v = qkv(kv_heads=H)
    check_dense(by_dynamo, F.scaled_dot_product_attention, q[:, :, :1], k, v, reason="decode step")


@both
def test_operands_written_in_place_before_are_read_after(trace):
    def function(q, k, v):
        k = k.clone()
        k[:, :, :2] = 0.0
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    check_replaced(trace, function, *qkv(kv_heads=H))


def test_an_operand_written_in_place_meanwhile_stays_dense():
    def function(q, k, v):
        k = k.clone()
        scores = q @ k.mT
        k.zero_()
        return scores.masked_fill(~causal(scores), -math.inf).softmax(-1) @ v + k

    check_dense(by_dynamo, function, *qkv(kv_heads=H), reason="written in place")


def test_scores_scaled_in_place_beside_a_written_cache():
    """Writes between the products matter only where they reach an operand."""

    def function(q, k, v, cache):
        cache.index_copy_(2, torch.arange(L), k)
        scores = q @ cache.mT
        scores /= 4.0
        return scores.masked_fill(~causal(q), -math.inf).softmax(-1) @ v

    q, k, v = qkv(kv_heads=H)
    outcome = by_dynamo(function, q, k, v, torch.zeros_like(k))
    assert outcome.replaced == [True], outcome.reasons
    torch.testing.assert_close(outcome.result, function(q, k, v, torch.zeros_like(k)), atol=2e-5, rtol=2e-5)


def test_a_cache_written_between_the_products_stays_dense():
    def function(q, k, v, cache):
        cache.copy_(k)
        scores = (q @ cache.mT).masked_fill(~causal(q), -math.inf)
        cache.view(-1).mul_(2.0)
        return scores.softmax(-1) @ v

    q, k, v = qkv(kv_heads=H)
    outcome = by_dynamo(function, q, k, v, torch.zeros_like(k))
    assert outcome.replaced == [False]
    assert "written in place" in outcome.reasons[0]
    torch.testing.assert_close(outcome.result, function(q, k, v, torch.zeros_like(k)))


def test_a_mask_written_in_place_is_not_taken():
    def function(q, k, v):
        mask = causal(q)
        mask[3, 1] = False
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    outcome = by_dynamo(function, *qkv(kv_heads=H))
    assert outcome.replaced == [False]


def test_autocast_casts_as_the_dense_operator_does():
    def function(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    args = qkv(kv_heads=H)
    outcome = by_dynamo(function, *args)
    assert outcome.replaced == [True], outcome.reasons
    assert outcome.result.dtype == torch.bfloat16
    torch.testing.assert_close(outcome.result, function(*args), atol=2e-2, rtol=2e-2)


def test_head_dim_above_the_kernels_stays_dense():
    args = (torch.randn(1, 2, L, 320) for _ in range(3))
    check_dense(by_dynamo, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *args, reason="head dim 320")


def test_gradients_stay_dense():
    from tsa_compile.backend import Backend
    from tsa_compile.plan import as_plan

    torch._dynamo.reset()
    backend = Backend(as_plan(None), "eager")
    q, k, v = (x.requires_grad_() for x in qkv(kv_heads=H))
    out = torch.compile(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), backend=backend)()
    out.sum().backward()
    assert q.grad is not None
    assert "gradients" in backend.report.sites[0].reason


@both
def test_two_attentions_are_two_sites(trace):
    def function(q, k, v):
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.scaled_dot_product_attention(x, k, v, is_causal=True) + F.scaled_dot_product_attention(q, k, x)

    outcome = trace(function, *qkv(kv_heads=H))
    assert outcome.replaced == [True, True, False]


@pytest.mark.parametrize(("method", "replaced"), [(torch.Tensor.__le__, True), (torch.Tensor.__ge__, False)])
def test_comparisons_as_methods(method, replaced):
    """torch 2.11 traces comparisons in vmapped masks as `Tensor.__le__`."""

    def function(q, k, v):
        mask = torch.arange(L)[None, :] <= torch.arange(L)[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    decided = []

    def backend(gm, inputs):
        (node,) = (n for n in gm.graph.nodes if n.target is operator.le)
        node.target = method
        decided.extend(run_pipeline(gm, lambda site: KEEP_ALL).decisions)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend)(*qkv(kv_heads=H))
    assert [d.reason is None for d in decided] == [replaced]


@both
def test_padding_alone_as_an_added_mask_is_bidirectional(trace):
    """A run-time boolean that is the whole condition of an added mask."""

    def function(q, k, v, visible):
        mask = torch.where(visible[:, None, None, :], torch.zeros(()), torch.finfo(q.dtype).min)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    check_dense(trace, function, *qkv(kv_heads=H), visible_keys(), reason="bidirectional")


@both
@pytest.mark.parametrize(("hidden", "reason"), [(-math.inf, None), (-1.0, "neither leaves nor hides")])
def test_nested_masks_with_run_time_booleans(trace, hidden, reason):
    def function(q, k, v, visible):
        inner = torch.where(visible[:, None, None, :], torch.zeros(()), hidden)
        mask = torch.where(causal(q), inner, -math.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    args = (*qkv(kv_heads=H), visible_keys())
    if reason is not None:
        check_dense(trace, function, *args, reason=reason)
        return
    outcome = trace(function, *args)
    assert outcome.replaced == [True], outcome.reasons
    torch.testing.assert_close(outcome.result[0], function(*args)[0], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(outcome.result[1, :, :-3], function(*args)[1, :, :-3], atol=2e-5, rtol=2e-5)


@both
@pytest.mark.parametrize("shift", [lambda s: s.amax(-1, keepdim=True), lambda s: s.max(dim=-1, keepdim=True).values])
def test_scores_less_their_maximum(trace, shift):
    def function(q, k, v):
        scores = (q @ k.mT).masked_fill(~causal(q), -1e9)
        return (scores - shift(scores)).softmax(-1) @ v

    check_replaced(trace, function, *qkv(kv_heads=H))


def test_scores_less_something_of_the_keys_are_not_recognised():
    def function(q, k, v):
        scores = (q @ k.mT).masked_fill(~causal(q), -1e9)
        return (scores - scores.amax(-2, keepdim=True)).softmax(-1) @ v

    outcome = by_dynamo(function, *qkv(kv_heads=H))
    assert outcome.replaced == []
    assert "cannot read its scores through" in outcome.warnings[0]


def test_sinks_stay_dense():
    def function(q, k, v, sinks):
        scores = (q @ k.mT).masked_fill(~causal(q), -1e9)
        scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(B, -1, L, -1)], dim=-1)
        weights = (scores - scores.max(dim=-1, keepdim=True).values).softmax(-1)
        return weights[..., :-1] @ v

    check_dense(by_dynamo, function, *qkv(kv_heads=H), torch.randn(H), reason="attention sinks")


def test_weights_without_their_first_keys_stay_dense():
    def function(q, k, v):
        scores = (q @ k.mT).masked_fill(~causal(q), -1e9)
        return scores.softmax(-1)[..., 1:] @ v[:, :, 1:]

    outcome = by_dynamo(function, *qkv(kv_heads=H))
    assert True not in outcome.replaced


@both
def test_a_softmax_with_operands_by_name(trace):
    def function(q, k, v):
        scores = (q @ k.mT).masked_fill(~causal(q), -math.inf)
        return torch.softmax(input=scores, dim=-1) @ v

    check_replaced(trace, function, *qkv(kv_heads=H))


def test_masks_with_operands_by_name_are_not_read():
    def function(q, k, v):
        mask = torch.logical_not(input=torch.triu(input=torch.ones(L, L), diagonal=1).bool())
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    outcome = by_dynamo(function, *qkv(kv_heads=H))
    assert outcome.replaced == [False]


@both
@pytest.mark.parametrize(
    ("widths", "value", "replaced"), [((0, 5), 0, True), ((0, 5), 1, False), ((2, 3), 0, False), ((0, 0, 0, 0), 0, False)]
)
def test_a_mask_padded_to_the_length_of_a_static_cache(trace, widths, value, replaced):
    """Keys behind the queries: hidden by the padding of the mask, and by causality anyway."""

    def function(q, k, v, visible):
        keys = F.pad(visible, widths, value=value)
        keys = F.pad(keys, (0, L + 5 - keys.shape[1]), value=True)  # as long as the keys in any case
        place = torch.arange(L + 5)[None, :] <= torch.arange(L)[:, None] + (5 if value else 0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=place & keys[:, None, None, :])

    q, k, v = qkv(kv_heads=H)
    k, v = (torch.cat([x, torch.randn(B, H, 5, D)], 2) for x in (k, v))
    outcome = trace(function, q, k, v, visible_keys())
    assert outcome.replaced == [replaced], outcome.reasons
    expected = function(q, k, v, visible_keys())
    torch.testing.assert_close(outcome.result[0], expected[0], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(outcome.result[1, :, : L - 3], expected[1, :, : L - 3], atol=2e-5, rtol=2e-5)
