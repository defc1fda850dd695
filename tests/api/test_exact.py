"""Exact: what dense attention gives, for each kind of mask, in eager code and in a graph's form."""

import pytest
import torch
import torch.nn.functional as F

import tsa_compile as tsa
from tsa_compile.kernels.types import KvView, Operands
from tsa_compile.passes.site import AttentionSite, MaskFacts
from tsa_compile.policies.base import call, from_dict
from tsa_compile.policies.why_dense import why_dense


def operands(rows=1, **more):
    q, k, v = torch.randn(2, 4, rows, 8), torch.randn(2, 2, 30, 8), torch.randn(2, 2, 30, 8)
    return Operands(q, k, v, **more)


def attended(x, mask, phase="verify"):
    site = AttentionSite.of(x, mask, phase=phase)
    policy = tsa.Exact()
    assert why_dense(policy, site) is None
    return policy.attend(call, site, policy.select(call, site, None))


def dense(x, visible):
    return F.scaled_dot_product_attention(x.q, x.k, x.v, visible, enable_gqa=True)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("window", [None, 7])
def test_causal_and_window(rows, window):
    x = operands(rows)
    j, own = torch.arange(30), torch.arange(30 - rows, 30)[:, None]
    visible = (j <= own) & (j > own - (window or 30))
    torch.testing.assert_close(attended(x, MaskFacts(causal=True, window=window)), dense(x, visible))


def test_bidirectional_with_padding_and_a_mask_as_data():
    key_mask, mask = torch.rand(2, 30) < 0.7, torch.randn(1, 4, 1, 30)
    x = operands(1, key_mask=key_mask, mask=mask)
    expected = dense(x, mask.masked_fill(~key_mask[:, None, None], -torch.inf))
    torch.testing.assert_close(attended(x, MaskFacts(padded=True), "decode"), expected)


def test_lengths_of_a_view_bound_each_row():
    x = operands(1, view=KvView(None, 1, None, torch.tensor([30, 11], dtype=torch.int32)))
    visible = torch.arange(30) < torch.tensor([30, 11])[:, None]
    torch.testing.assert_close(attended(x, MaskFacts(causal=True), "decode"), dense(x, visible[:, None, None]))


def test_what_it_is_not_for():
    site = AttentionSite.of(operands(17), MaskFacts(causal=True), phase="verify")
    assert why_dense(tsa.Exact(), site) == "17 query rows: decode takes up to 16"
    site = AttentionSite.of(operands(17), MaskFacts(causal=True), phase="prefill")
    assert "Exact is for decode and verify" in why_dense(tsa.Exact(), site)
    assert from_dict(tsa.Exact().to_dict()) == tsa.Exact()


def test_a_view_made_from_the_mask_changes_nothing():
    key_mask = torch.rand(2, 30) < 0.7
    x = operands(1, key_mask=key_mask)
    ordered = x._replace(view=KvView.ordered(*torch.ops.tsa.key_view(key_mask)))
    for policy in (tsa.Exact(), tsa.PageSparse(1.0)):
        for given in (x, ordered):
            site = AttentionSite.of(given, MaskFacts(causal=True, padded=True), phase="decode")
            out = policy.attend(call, site, policy.select(call, site, None))
            torch.testing.assert_close(out, dense(x, key_mask[:, None, None]))
