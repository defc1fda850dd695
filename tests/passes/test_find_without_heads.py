"""Attention without a dimension of heads: one head, or batch and heads merged. Each form has a twin that must not match."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tests.passes.graphs import by_dynamo, by_export
from tests.passes.test_find import check_dense, check_replaced
from tsa_compile import ProbeSparse

B, L, D, DV = 4, 11, 16, 24
both = pytest.mark.parametrize("trace", [by_dynamo, by_export])


def qkv():
    return torch.randn(B, L, D), torch.randn(B, L, D), torch.randn(B, L, DV)


def causal():
    return torch.ones(L, L, dtype=torch.bool).tril()


def minus_infinity(allowed):
    return torch.zeros(allowed.shape).masked_fill(~allowed, -math.inf)


def written_out(q, k, v):
    return (q @ k.transpose(-2, -1) * 0.3).masked_fill(~causal(), -math.inf).softmax(-1) @ v


def products(q, k, v):
    return torch.bmm((torch.bmm(q, k.permute(0, 2, 1)) / 4.0 + minus_infinity(causal())).softmax(-1), v)


def added_first(q, k, v):
    """`nn.MultiheadAttention` with weights; BLOOM."""
    return torch.baddbmm(minus_infinity(causal())[None], q, k.mT, alpha=0.5).softmax(-1).bmm(v)


def nothing_added(q, k, v):
    """diffusers: `beta=0`, so that what lies in the first operand does not count."""
    scores = torch.baddbmm(torch.full((B, L, L), math.nan), q, k.mT, beta=0, alpha=0.5)
    return (scores + minus_infinity(causal())).softmax(-1) @ v


def einsum(q, k, v):
    scores = torch.einsum("bqd,bkd->bqk", q, k).masked_fill(~causal(), -math.inf)
    return torch.einsum("bqk,bkd->qbd", scores.softmax(-1), v)


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@both
@pytest.mark.parametrize("form", [written_out, products, added_first, nothing_added, einsum, sdpa])
def test_found(trace, form):
    check_replaced(trace, form, *qkv())


@both
def test_padding_from_the_caller(trace):
    def function(q, k, v, real):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal() & real[:, None])

    real = torch.arange(L)[None] < torch.tensor([[L], [L - 3], [L], [L - 1]])
    args = (*qkv(), real)
    outcome = trace(function, *args)
    assert outcome.replaced == [True], outcome.reasons
    torch.testing.assert_close(outcome.result[real], function(*args)[real], atol=2e-5, rtol=2e-5)


def test_bidirectional_by_probes():
    function = lambda q, k, v: (torch.bmm(q, k.mT) * 0.25).softmax(-1) @ v  # noqa: E731
    args = qkv()
    outcome = by_dynamo(function, *args, policy=ProbeSparse(coverage=0.0, min_keys=1))
    assert outcome.replaced == [True], outcome.reasons
    torch.testing.assert_close(outcome.result, function(*args), atol=2e-5, rtol=2e-5)


@both
def test_a_mask_for_each_entry_is_not_causal(trace):
    def function(q, k, v):
        hidden = ~causal() | (torch.arange(B)[:, None, None] == torch.arange(L)[None, :, None])
        return (q @ k.mT).masked_fill(hidden, -1e9).softmax(-1) @ v

    check_dense(trace, function, *qkv(), reason="mask")


def test_a_negative_alpha_is_not_taken():
    def function(q, k, v):
        return torch.baddbmm(minus_infinity(causal())[None], q, k.mT, alpha=-0.5).softmax(-1) @ v

    check_dense(by_dynamo, function, *qkv(), reason="scale is not a positive constant")


def test_beta_scales_the_mask():
    """-inf stays hidden, whatever beta is; -2e4 does not at a beta of 0.01."""

    def function(q, k, v):
        mask = torch.zeros(L, L).masked_fill(~causal(), -2e4)
        return torch.baddbmm(mask[None], q, k.mT, beta=0.01).softmax(-1) @ v

    check_dense(by_dynamo, function, *qkv(), reason="neither leaves nor hides")


def test_heads_merged_between_the_products_stay_dense_in_prefill():
    def function(q, k, v):  # BLOOM: the scores get heads, and lose them again
        scores = torch.bmm(q, k.mT).view(2, 2, L, L).masked_fill(~causal(), -1e9)
        return scores.softmax(-1).view(B, L, L) @ v

    outcome = by_dynamo(function, *qkv())
    assert outcome.replaced == [False]
    assert "scores are masked by batch and head" in outcome.reasons[0]
