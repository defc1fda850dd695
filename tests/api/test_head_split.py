"""HeadSplit: local heads read the first and last tokens, the others the context."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import tsa_compile as tsa
from tests.cache.models import cache_name, tiny, token_ids
from tsa_compile.kernels.types import KvView, Operands
from tsa_compile.passes.site import AttentionSite, MaskFacts
from tsa_compile.policies.base import call, from_dict
from tsa_compile.policies.why_dense import why_dense
from tsa_compile.session import attached
from tsa_compile.steps import FIXED


def site_of(rows=1, start=(0, 130), lengths=(500, 77), key_mask=None):
    q, k, v = torch.randn(2, 4, rows, 8), torch.randn(2, 2, 500, 8), torch.randn(2, 2, 500, 8)
    view = KvView(None, 1, *(torch.tensor(x, dtype=torch.int32) for x in (start, lengths)))
    return AttentionSite.of(
        Operands(q, k, v, key_mask, view), MaskFacts(causal=True, padded=key_mask is not None), phase="decode"
    )


def attended(policy, site):
    assert why_dense(policy, site) is None
    selection = policy.select(call, site, None)
    return policy.attend(call, site, selection), selection


def expected(site, local, sinks, window):
    """Dense attention under a mask that says for each head what it sees."""
    x, j = site.operands, torch.arange(500)
    first, end = x.view.start[:, None], (x.view.start + x.view.lengths)[:, None]
    there = (j >= first) & (j < end) if x.key_mask is None else x.key_mask & (j >= first) & (j < end)
    near = there & ((j >= end - window) | (j < first + sinks))
    seen = torch.stack([near if h in local else there for h in range(4)], 1)[:, :, None]
    return F.scaled_dot_product_attention(x.q, x.k, x.v, seen, enable_gqa=True)


@pytest.mark.parametrize(("sinks", "window"), [(4, 40), (0, 1), (17, 33), (2, 10**6)])
@pytest.mark.parametrize("retrieval", [(), (1,), (0, 3), (0, 1, 2, 3)])
def test_each_head_reads_what_its_role_says(retrieval, sinks, window):
    site = site_of()
    got, selection = attended(tsa.HeadSplit(retrieval, sinks=sinks, window=window), site)
    torch.testing.assert_close(got, expected(site, {*range(4)} - {*retrieval}, sinks, window))
    if window == 40:
        few = selection.counts[0] < 8  # of 32 pages
        assert few.tolist() == [not {0, 1} & {*retrieval}, not {2, 3} & {*retrieval}]


def test_holes_and_padding_count_for_local_heads_by_position():
    key_mask = torch.rand(2, 500) < 0.7
    site = site_of(key_mask=key_mask)
    got, _ = attended(tsa.HeadSplit((1,), window=50), site)
    torch.testing.assert_close(got, expected(site, {0, 2, 3}, 4, 50))


def test_heads_that_look_things_up_may_read_the_best_pages():
    site = site_of(start=(0, 0), lengths=(500, 500))
    got, selection = attended(tsa.HeadSplit((0, 1), keep=0.5, window=16), site)
    assert selection.counts.tolist() == [[16, 4], [16, 4]]  # half of 32; one sink may lie in two pages, as may the window
    kept = torch.zeros(2, 2, 32, dtype=torch.bool)
    for b in range(2):
        kept[b, 0, selection.indices[b, 0, :16].long()] = True
    seen = kept.repeat_interleave(16, 2)[..., :500]
    x = site.operands
    want = F.scaled_dot_product_attention(x.q[:, :2], x.k[:, :1], x.v[:, :1], seen[:, :1, None], enable_gqa=True)
    torch.testing.assert_close(got[:, :2], want)


def test_fields_and_refusals():
    for fields, message in (
        ({"retrieval": 3}, "HeadSplit.retrieval must be numbers of query heads, each once, got 3"),
        ({"retrieval": (1, 1)}, "each once"),
        ({"retrieval": (), "window": 0}, "HeadSplit.window must be an int >= 1, got 0"),
        ({"retrieval": (), "keep": 0}, r"HeadSplit.keep must be a number in \(0, 1\], got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            tsa.HeadSplit(**fields)
    assert why_dense(tsa.HeadSplit((4,)), site_of()) == "HeadSplit.retrieval names head 4 of 4"
    assert why_dense(tsa.HeadSplit(()), site_of(2)) == "2 query rows: roles of heads are for one"
    policy = tsa.HeadSplit([2, 0], keep=0.1)
    assert from_dict(policy.to_dict()) == policy


def test_generate_by_roles_of_each_layer():
    """All heads looking things up is the untouched model; local ones change the logits of a long prompt, and of no short one."""
    transformers = pytest.importorskip("transformers")
    found = {}
    torch._dynamo.reset()
    model = tsa.transform(tiny("llama"), tsa.Plan(prefill=tsa.Dense(), decode=tsa.Exact()))
    for calls, (name, heads) in enumerate((("all", (0, 1, 2, 3)), ("some", (1,))), 1):
        rules = [(1, "decode", tsa.HeadSplit(heads, window=30))]
        attached(model).plan = tsa.Plan(prefill=tsa.Dense(), decode=tsa.Exact(), rules=rules)  # no other trace
        for length in (20, 150):
            ids, cache = token_ids(length, 2), transformers.DynamicCache(config=model.config)
            with torch.no_grad():
                model(ids[:, :-1], **{cache_name(model): cache})
                found[name, length] = model(ids[:, -1:], **{cache_name(model): cache}).logits[:, -1]
                want = tiny("llama")(ids).logits[:, -1]
            assert torch.allclose(found[name, length], want, atol=1e-5) == (name == "all" or length == 20)
        assert tsa.report(model).steps == {FIXED: 2 * calls}


def test_prompts_are_read_by_roles_too():
    """Heads that look things up read every key, local ones their window and the sinks, and at most 190 keys before the window."""
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, h, 700, 8, generator=g) for h in (4, 2, 2))
    site = AttentionSite.of(Operands(q, k, v), MaskFacts(causal=True))
    policy = tsa.HeadSplit((1, 2), sinks=4, window=40)
    out = policy.attend(call, site, policy.select(call, site, None))
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out[:, [1, 2]], dense[:, [1, 2]])
    other = v.clone()
    other[:, :, 64:300] = 9.0  # no sink, and before the window of every row from 490 on
    moved = tsa.HeadSplit((1, 2), sinks=4, window=40).attend(
        call, AttentionSite.of(Operands(q, k, other), MaskFacts(causal=True)), policy.select(call, site, None)
    )
    changed = (moved != out).flatten(2).view(4, 700, 8).any(-1)
    assert not changed[[0, 3], 490:].any()
    assert changed[[1, 2], 490:].all()
    other = v.clone()
    other[:, :, [2, 461]] = 9.0  # a sink and a key of the window of row 500
    moved = policy.attend(call, dataclasses.replace(site, operands=Operands(q, k, other)), policy.select(call, site, None))
    assert (moved != out)[0, :, 500].any(-1).all()
    few = AttentionSite.of(Operands(q[:, :, :40], k, v), MaskFacts(causal=True), phase="prefill")
    assert why_dense(policy, few) == "40 queries over a cache: HeadSplit is for more than 128"
    both = AttentionSite.of(Operands(q, k, v), MaskFacts(), phase="prefill")
    assert why_dense(policy, both) == "bidirectional: no causal mask"


def test_a_plan_with_roles_for_prompts_and_steps():
    transformers = pytest.importorskip("transformers")
    torch._dynamo.reset()
    rules = [("model.layers.*.self_attn", phase, tsa.HeadSplit((0, 1, 2, 3))) for phase in ("prefill", "decode")]
    model = tsa.transform(tiny("llama", layers=1), tsa.Plan(prefill=tsa.HeadSplit(()), decode=tsa.HeadSplit(()), rules=rules))
    ids, cache = token_ids(300, 2), transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        first = model(ids[:, :-1], **{cache_name(model): cache}).logits
        last = model(ids[:, -1:], **{cache_name(model): cache}).logits
        want = tiny("llama", layers=1)(ids).logits
    torch.testing.assert_close(torch.cat([first, last], 1), want, atol=1e-4, rtol=1e-4)
    assert [(s.policy, s.replaced) for s in tsa.report(model).sites] == [("HeadSplit", True)] * 2
