"""Counted bytes against what operators show that they read: a row is read if another key or value there changes the output."""

from __future__ import annotations

import pytest
import torch

import tsa_compile as tsa
from tsa_compile.kernels.types import KvView, Operands
from tsa_compile.passes.site import AttentionSite, MaskFacts
from tsa_compile.policies.base import call
from tsa_compile.tools.evaluate.decode_bytes import Traffic

ROWS, HEADS, KV_HEADS, DIM, V_DIM = 39, 4, 2, 8, 6

SEED = {"seed": torch.tensor([5])}
POLICIES = [
    tsa.Exact(),
    tsa.PageSparse(pages=2, sinks=0, recent=1),
    tsa.PageSparse(pages=2, sinks=0, recent=1, kind="basis", refine=0.5, completion=True),
    tsa.HeadSplit((1,), keep=0.5, sinks=2, window=9),
    tsa.SampledValues(6),
    tsa.SampledValues(6, "flash"),
    tsa.SampledValues(200),
    tsa.SampledValues(8, "teams", recent=1),
]


def attended(policy, q, k, v, lengths):
    site = AttentionSite.of(Operands(q, k, v, None, KvView(None, 1, None, lengths)), MaskFacts(causal=True), phase="decode")
    state = SEED if isinstance(policy, tsa.SampledValues) else None
    return policy.attend(call, site, policy.select(call, site, state))


def by_key(policy):
    """Are keys scored one by one, all of them?"""
    return isinstance(policy, tsa.Exact) or (isinstance(policy, tsa.SampledValues) and policy.form != "teams")


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_counted_rows_are_those_that_change_the_output(policy):
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, h, n, d, generator=g) for h, n, d in ((HEADS, 1, DIM), (KV_HEADS, 44, DIM), (KV_HEADS, 44, V_DIM)))
    lengths = torch.tensor([ROWS], dtype=torch.int32)
    with Traffic() as traffic:
        want = attended(policy, q, k, v, lengths)
    assert traffic.attentions == 1
    read = {"keys": 0, "values": 0}
    for head in range(KV_HEADS):
        for j in range(k.shape[2]):
            other = v.clone()
            other[:, head, j] = torch.nan
            read["values"] += V_DIM * 4 * bool(attended(policy, q, k, other, lengths).isnan().any())
            if by_key(policy):
                other = k.clone()
                other[:, head, j] = 9 * q.unflatten(1, (KV_HEADS, -1))[:, head].mean(1)[:, 0]
                read["keys"] += DIM * 4 * (not torch.equal(attended(policy, q, other, v, lengths), want))
    if getattr(policy, "completion", False):
        read["values"] -= 16 * KV_HEADS * V_DIM * 4  # of unread pages, which are in their means
    whole, made = 2 * KV_HEADS, ROWS * KV_HEADS * DIM * 4  # pages; an index that nobody keeps is made from every key
    if not by_key(policy):  # keys are read with their values
        read["keys"] = read["values"] // V_DIM * DIM
        is_pages = not isinstance(policy, tsa.SampledValues)
        read["index"] = made + (whole * DIM * 4 + 2 * 4 if is_pages else whole * 8)
        if getattr(policy, "completion", False):  # bases from every key, one page of two; mean values, one page of two unread
            read["index"] += made + KV_HEADS * (8 * DIM // 2 + 8 * 16 + 8 * 2)
            read["index"] += ROWS * KV_HEADS * V_DIM * 4 + KV_HEADS * V_DIM * 4
        read["keys"] += 0 if is_pages else whole * 4 * DIM * 4  # and four representatives of a page are scored
    assert dict(traffic.read) == read


def test_a_page_that_fills_is_read_for_its_sum():
    keys = torch.randn(2, 2, 64, 8)
    sums, counts = torch.ops.tsa.page_sums(keys, None, 1, None, None, None)
    begin, end = (torch.tensor(x, dtype=torch.int32) for x in ([15, 20], [16, 21]))
    with Traffic() as traffic:
        torch.ops.tsa.append_pages(sums, counts, keys, None, 1, None, begin, end, None, 1)
    assert traffic.read == {"index": 16 * 2 * 8 * 4}


def test_an_operator_without_a_rule_is_refused():
    x = torch.randn(1, 2, 8, 8)
    with pytest.raises(ValueError, match="no rule says what tsa::merge reads"), Traffic():
        torch.ops.tsa.merge(x, x[..., 0], x, x[..., 0])
