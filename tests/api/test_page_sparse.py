"""PageSparse: its budgets, its state, and what it computes, in eager code by the references."""

import pytest
import torch
import torch.nn.functional as F

import tsa_compile as tsa
from tsa_compile.kernels.types import KvView, Operands
from tsa_compile.passes.site import AttentionSite, MaskFacts
from tsa_compile.policies.base import call, from_dict
from tsa_compile.policies.why_dense import why_dense


def site_of(rows=1, length=500, lengths=None, key_mask=None, phase="decode"):
    q, k, v = torch.randn(2, 4, rows, 8), torch.randn(2, 2, length, 8), torch.randn(2, 2, length, 8)
    view = KvView(None, 1, None, None if lengths is None else torch.tensor(lengths, dtype=torch.int32))
    return AttentionSite.of(Operands(q, k, v, key_mask, view), MaskFacts(causal=True), phase=phase)


def attended(policy, site, state=None):
    assert why_dense(policy, site) is None
    selection = policy.select(call, site, state)
    return policy.attend(call, site, selection), selection


@pytest.mark.parametrize(
    "policy",
    [
        tsa.PageSparse(1.0),
        tsa.PageSparse(pages=10**6),
        tsa.PageSparse(schedule=(999,)),
        tsa.PageSparse(1.0, "basis", True),
        tsa.PageSparse(1.0, "basis", refine=1.0),
    ],
)
def test_every_page_is_exact(policy):
    site = site_of(lengths=(500, 77))
    visible = torch.arange(500) < torch.tensor([500, 77])[:, None]
    x = site.operands
    expected = F.scaled_dot_product_attention(x.q, x.k, x.v, visible[:, None, None], enable_gqa=True)
    torch.testing.assert_close(attended(policy, site)[0], expected)


def test_only_the_chosen_pages_are_read():
    site = site_of()
    out, selection = attended(tsa.PageSparse(0.25), site)
    assert selection.counts.tolist() == [[8, 8], [8, 8]]  # a quarter of 32 pages
    kept = torch.zeros(2, 2, 32, dtype=torch.bool).scatter(2, selection.indices.long(), True)
    assert kept[..., [0, 29, 30, 31]].all()
    keys = kept.repeat_interleave(16, 2)[..., :500].repeat_interleave(2, 1)[:, :, None]
    x = site.operands
    torch.testing.assert_close(out, F.scaled_dot_product_attention(x.q, x.k, x.v, keys, enable_gqa=True))


def test_a_list_is_one_share_a_kv_head_and_padding_is_no_page():
    padded = torch.arange(500) >= torch.tensor([0, 160])[:, None]  # 10 of 32 pages are padding
    _, selection = attended(tsa.PageSparse(keep=[0.5, 0.25]), site_of(key_mask=padded))
    assert selection.counts.tolist() == [[16, 8], [11, 6]]
    assert int(selection.indices[1, :, 0].min()) == 10  # the first page that holds a key


def test_the_state_of_the_cache_gives_the_same_selection():
    site = site_of()
    sums, counts = torch.full((2, 2, 32, 8), torch.nan), torch.zeros(2, 1, 32, dtype=torch.int32)
    for begin, end in ((0, 300), (300, 499), (499, 500)):
        bounds = [torch.full((2,), n, dtype=torch.int32) for n in (begin, end)]
        torch.ops.tsa.append_pages(sums, counts, site.operands.k, None, 1, None, *bounds, None, end - begin)
    fresh = attended(tsa.PageSparse(0.2), site)
    kept = attended(tsa.PageSparse(0.2), site, {"sums": sums, "counts": counts})
    assert torch.equal(fresh[1].indices, kept[1].indices)
    assert torch.equal(fresh[0], kept[0])
    others = attended(tsa.PageSparse(0.2), site, {"seed": torch.zeros(2, dtype=torch.long)})  # a state of another policy's
    assert torch.equal(fresh[0], others[0])


def test_in_one_graph():
    site, policy = site_of(), tsa.PageSparse(0.2)
    step = torch.compile(lambda: attended(policy, site)[0], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(), attended(policy, site)[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of keep, pages, mass, schedule, got none"),
        ({"keep": 0.1, "pages": 3}, "got keep and pages"),
        ({"keep": 0.0}, r"PageSparse.keep must be a number in \(0, 1\].* got 0.0"),
        ({"keep": ()}, "PageSparse.keep"),
        ({"keep": [0.1, 1.2]}, "PageSparse.keep"),
        ({"pages": 0}, "PageSparse.pages must be an int >= 1, got 0"),
        ({"mass": 1.0}, r"PageSparse.mass must be a number in \(0, 1\), got 1.0"),
        ({"schedule": (3, -1)}, "PageSparse.schedule must be ints >= 0"),
        ({"keep": 0.1, "kind": "max"}, r"PageSparse.kind must be one of \('mean', 'basis'\), got 'max'"),
        ({"keep": 0.1, "completion": 1}, "PageSparse.completion must be True or False, got 1"),
        ({"keep": 0.1, "refine": 0.0}, r"PageSparse.refine must be a number in \(0, 1\], got 0.0"),
        ({"keep": 0.1, "recent": 0}, "PageSparse.recent must be an int >= 1, got 0"),
    ],
)
def test_a_bad_value_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        tsa.PageSparse(**fields)


def test_refusals_and_round_trip():
    assert why_dense(tsa.PageSparse((0.1, 0.2, 0.3)), site_of()) == "PageSparse.keep has 3 shares for 2 KV heads"
    assert why_dense(tsa.PageSparse(0.1), site_of(17, phase="draft")) == "17 query rows: decode takes up to 16"
    for policy in (tsa.PageSparse(0.1), tsa.PageSparse(keep=(0.1, 0.2)), tsa.PageSparse(schedule=(3, 5))):
        assert from_dict(policy.to_dict()) == policy


def spiked(length=512):
    """A page whose mean says nothing: +5 and -5 along a direction of its own, which the queries look for."""
    site = site_of(length=length)
    x = site.operands
    x.k.mul_(0.1)
    x.k[:, :, 160:176] += 5 * torch.randn(8).sign() * torch.tensor([1.0, -1.0]).repeat(8)[:, None]
    x.q.copy_(x.k[:, :, 161:162].repeat_interleave(2, 1))
    return site


def test_a_basis_finds_what_means_hide():
    site = spiked()
    chosen = {kind: tsa.PageSparse(0.2, kind, refine=1.0).select(call, site, None) for kind in ("mean", "basis")}
    ranks = {kind: (x.indices == 10).any(-1).float().mean().item() for kind, x in chosen.items()}
    assert ranks["basis"] == 1.0
    assert ranks["mean"] < 1.0
    some = tsa.PageSparse(0.2, "basis", refine=0.1).select(call, site, None)
    assert some.counts.tolist() == chosen["basis"].counts.tolist()


def test_completion_adds_the_means_of_unread_pages():
    site = site_of(lengths=(500, 77))
    x = site.operands
    plain, lists = attended(tsa.PageSparse(0.25), site)
    out, selection = attended(tsa.PageSparse(0.25, completion=True), site)
    assert torch.equal(selection.indices, lists.indices)
    assert (out - plain)[0].abs().max() > 1e-3
    view = (None, 1, None, torch.tensor([500, 77], dtype=torch.int32))
    part = torch.ops.tsa.page_attention(x.q, x.k, x.v, *lists, *view, None, site.scale)
    sums, counts = torch.ops.tsa.page_sums(x.v, *view, None)
    logits = torch.ops.tsa.page_scores(x.q, *torch.ops.tsa.page_sums(x.k, *view, None), *view, 500, site.scale)[0]
    expected = torch.ops.tsa.complete_pages(*part, logits, sums, counts, *lists, *view, 500)[0]
    torch.testing.assert_close(out, expected)
    assert not tsa.PageSparse(0.25, completion=True).shareable
    assert why_dense(tsa.PageSparse(0.1, completion=True), site_of(2, phase="draft")) == "2 query rows: completion is for one"
    odd = torch.randn(1, 2, 1, 7), torch.randn(1, 2, 64, 7), torch.randn(1, 2, 64, 7)
    odd_site = AttentionSite.of(Operands(*odd), MaskFacts(causal=True), phase="decode")
    assert why_dense(tsa.PageSparse(0.1, "basis"), odd_site) == "head dim 7 is odd: a basis packs its halves together"


def test_other_indexes_are_refused_where_means_alone_are_known():
    for policy in (tsa.PageSparse(0.1, "basis"), tsa.PageSparse(0.1, completion=True)):
        assert from_dict(policy.to_dict()) == policy
        with pytest.raises(ValueError, match=r"Routed.inner ranks pages by mean keys, without completion, got PageSparse"):
            tsa.Routed(policy)


def test_the_basis_ranks_twice_what_is_read():
    site = spiked(length=1024)
    called = []

    def emit(operator, *args):
        called.append((operator, args))
        return operator(*args)

    tsa.PageSparse((0.05, 0.3), "basis", refine=0.1).select(emit, site, None)
    firsts = [args[9] for operator, args in called if operator is torch.ops.tsa.select_pages.default]
    assert firsts == [[0.1, 0.6], [0.05, 0.3]]
