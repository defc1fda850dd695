"""Dense sites lose mask tensors that say no more than `is_causal`, and only those."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tsa_compile as tsa
from tests.passes.graphs import Wrapped
from tsa_compile.passes.facts.names import arg, op_name
from tsa_compile.passes.pipeline import run_pipeline


def attend(q, k, v, mask=None, **kwargs):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **kwargs)


def causal(q, k, offset=0):
    return torch.arange(k.shape[2])[None, :] <= torch.arange(q.shape[2])[:, None] + offset


def run(function, *args, how):
    """(is_causal of each attention, whether it has a mask, nodes left, masks dropped, outputs before and after)"""
    found = []

    def backend(gm, inputs):
        found.append((gm, run_pipeline(gm, lambda site: tsa.Dense())))
        return gm.forward

    with torch.no_grad():
        before = function(*args)
        if how == "dynamo":
            torch._dynamo.reset()
            after = torch.compile(function, backend=backend, fullgraph=True)(*args)
        else:
            program = torch.export.export(Wrapped(function).eval(), args)
            backend(program.graph_module, args)
            after = program.module()(*args)
    gm, result = found[0]
    calls = [n for n in gm.graph.nodes if op_name(n) == "scaled_dot_product_attention"]
    forms = [(arg(n, 5, "is_causal", False), arg(n, 3, "attn_mask") is not None) for n in calls]
    return forms, [op_name(n) for n in gm.graph.nodes], result.counts["drop_masks"], before, after


def qkv(q_len=12, k_len=12):
    torch.manual_seed(0)
    return torch.randn(2, 2, q_len, 16), torch.randn(2, 2, k_len, 16), torch.randn(2, 2, k_len, 16)


PAD = torch.arange(12)[None, :] >= torch.tensor([[0], [3]])
DROPPED = {
    "bool": (lambda q, k, v: attend(q, k, v, causal(q, k)), qkv(), True),
    "additive": (lambda q, k, v: attend(q, k, v, torch.where(causal(q, k), 0.0, torch.finfo(q.dtype).min)), qkv(), True),
    "all true": (lambda q, k, v: attend(q, k, v, torch.ones(12, 12, dtype=torch.bool)), qkv(), False),
    "everything visible": (lambda q, k, v: attend(q, k, v, causal(q, k, 40)), qkv(), False),
    "decode": (lambda q, k, v: attend(q, k, v, causal(q, k, 11)), qkv(1, 12), False),
}
KEPT = {
    "chunked": (lambda q, k, v: attend(q, k, v, causal(q, k, 4)), qkv(8, 12)),
    "off by one": (lambda q, k, v: attend(q, k, v, causal(q, k, 1)), qkv()),
    "top left": (lambda q, k, v: attend(q, k, v, causal(q, k)), qkv(8, 12)),
    "padding": (lambda q, k, v, pad: attend(q, k, v, causal(q, k) & pad[:, None, None]), (*qkv(), PAD)),
    "sliding": (lambda q, k, v: attend(q, k, v, causal(q, k) & ~causal(q, k, -4)), qkv()),
    "given": (attend, (*qkv(), causal(*qkv()[:2]))),
    "bias": (lambda q, k, v: attend(q, k, v, torch.where(causal(q, k), 0.1, -1e9)), qkv()),
}


@pytest.mark.parametrize("how", ["dynamo", "export"])
@pytest.mark.parametrize("name", DROPPED)
def test_dropped(name, how):
    function, args, is_causal = DROPPED[name]
    forms, left, count, before, after = run(function, *args, how=how)
    assert (forms, count) == ([(is_causal, False)], 1)
    assert not {"arange", "le", "where"} & set(left)
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("how", ["dynamo", "export"])
@pytest.mark.parametrize("name", KEPT)
def test_kept(name, how):
    function, args = KEPT[name]
    forms, _, count, before, after = run(function, *args, how=how)
    assert (forms, count) == ([(False, True)], 0)
    assert torch.equal(after, before)


@pytest.mark.parametrize("how", ["dynamo", "export"])
def test_a_mask_that_another_attention_needs_stays_for_that_one(how):
    def two(q, k, v):
        mask = causal(q, k)
        return attend(q, k, v, mask) + attend(q, k, v, mask & causal(k, q).T) + mask.sum()

    forms, left, count, before, after = run(two, *qkv(), how=how)
    assert forms == [(True, False), (False, True)]
    assert count == 1
    assert "arange" in left
    torch.testing.assert_close(after, before)


def test_a_dynamic_length():
    def function(q, k, v):
        return attend(q, k, v, causal(q, k))

    args, length = qkv(), torch.export.Dim("length", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(Wrapped(function).eval(), args, dynamic_shapes={"args": tuple({2: length} for _ in args)})
        result = run_pipeline(program.graph_module, lambda site: tsa.Dense())
        assert result.counts["drop_masks"] == 1
        for n in (12, 2, 33):
            torch.testing.assert_close(program.module()(*qkv(n, n)), function(*qkv(n, n)))
