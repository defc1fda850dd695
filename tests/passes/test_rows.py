"""The phase by the number of query rows over a cache: 1 is decode, 2 to 16 verify, up to `min_queries` the model's own."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import tsa_compile as tsa
from tsa_compile.backend import Backend
from tsa_compile.passes.site import phase_of
from tsa_compile.plan import Plan
from tsa_compile.recorder import record_kept

PAST = 200
POLICY = tsa.TokenSparse(coverage=0.5, window=8, min_tokens=8, min_queries=40, completion=None)


def over_a_cache(q, k, v):
    rows = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.arange(k.shape[2]) <= rows, enable_gqa=True)


def cached(past, x):
    """Keys and values as a dynamic cache makes them: `past` `[B, 2 Hk, past, D]`, `x` `[B, H + 2 Hk, rows, D]`."""
    (k_past, v_past), (q, k, v) = past.chunk(2, 1), x.split([4, 2, 2], 1)
    return over_a_cache(q, torch.cat([k_past, k], 2), torch.cat([v_past, v], 2))


def operands(rows: int):
    return torch.randn(1, 4, PAST, 16), torch.randn(1, 8, rows, 16)


def with_dynamic_lengths(*tensors):
    for x in tensors:
        torch._dynamo.mark_dynamic(x, 2)
    return tensors


@pytest.mark.parametrize(
    ("rows", "past", "causal", "phase"),
    [(1, True, True, "decode"), (1, False, False, "decode"), (2, True, True, "verify"), (16, True, True, "verify"),
     (17, True, True, "prefill"), (9, False, True, "prefill"), (9, True, False, "prefill")],
)  # fmt: skip
def test_the_phase(rows, past, causal, phase):
    assert phase_of(rows, past, causal) == phase


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (1, "decode step: one query"),
        (2, "verify step: 2 queries over a cache"),
        (16, "verify step: 16 queries over a cache"),
        (17, "17 queries over a cache: TokenSparse is for more than 40"),
        (40, "40 queries over a cache: TokenSparse is for more than 40"),
        (41, ""),
    ],
)
def test_a_fixed_number_of_rows(rows, reason):
    torch._dynamo.reset()
    backend, x = Backend(Plan(POLICY), "eager"), operands(rows)
    with torch.no_grad():
        torch.compile(cached, backend=backend, dynamic=False)(*x)
    assert [s.reason for s in backend.report.sites] == [reason]
    assert [s.replaced for s in backend.report.sites] == [not reason]


@pytest.mark.parametrize("policy", [POLICY, dataclasses.replace(POLICY, min_queries=0)])
def test_a_number_of_rows_that_varies(policy):
    """One graph serves all: its operator is exact for few rows, and no guard tells them apart."""
    torch._dynamo.reset()
    backend = Backend(Plan(policy), "eager")
    compiled = torch.compile(cached, backend=backend, fullgraph=True)
    exact = max(policy.min_queries, 16)
    for rows in (60, 2, 6, 16, 17, exact, exact + 1, 90):
        x = operands(rows)
        with torch.no_grad(), record_kept() as kept:
            actual, expected = compiled(*with_dynamic_lengths(*x)), cached(*x)
        if rows <= exact:
            torch.testing.assert_close(actual, expected)
            assert kept.shares() == [1.0]
        else:
            assert (actual - expected).abs().max() > 1e-2
            assert kept.shares()[0] < 0.9
    (site,) = backend.report.sites
    assert site.replaced
    assert site.reason == f"dense for up to {exact} queries over a cache; up to 16 tokens are all kept"


def test_a_number_of_rows_that_varies_by_blocks():
    torch._dynamo.reset()
    backend = Backend(Plan(tsa.BlockSparse(0.999, pool=32, window=1, sinks=0, last_dense=0)), "eager")
    compiled = torch.compile(cached, backend=backend, fullgraph=True)
    for rows in (200, 2, 16, 17, 128, 129, 400):
        x = operands(rows)
        with torch.no_grad(), record_kept() as kept:
            actual, expected = compiled(*with_dynamic_lengths(*x)), cached(*x)
        if rows <= 128:
            torch.testing.assert_close(actual, expected)
            assert kept.shares() == [1.0]
        else:
            assert (actual - expected).abs().max() > 1e-2
            assert kept.shares()[0] < 0.95
    (site,) = backend.report.sites
    assert (site.replaced, site.reason) == (True, "dense for up to 128 queries over a cache")


def test_an_empty_cache_is_prefill_for_any_number_of_rows():
    def attention(q):
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    torch._dynamo.reset()
    backend = Backend(Plan(POLICY), "eager")
    compiled = torch.compile(attention, backend=backend)
    for rows in (6, 30, 200):
        with torch.no_grad(), record_kept() as kept:
            compiled(*with_dynamic_lengths(torch.randn(1, 2, rows, 16)))
    assert kept.shares()[0] < 0.9
    assert [(s.replaced, s.reason) for s in backend.report.sites] == [(True, "up to 16 tokens are all kept")]
