"""Bases of pages and what they say of a page's mass: references against their definition, Triton against the references."""

from __future__ import annotations

import pytest
import torch

from tsa_compile.kernels import ops  # noqa: F401
from tsa_compile.kernels.common.page_basis import HIDDEN, PageBasis, empty_basis, pack, unpack
from tsa_compile.kernels.score.page_basis.reference import refine_scores_reference
from tsa_compile.kernels.state.append_basis.reference import append_basis_reference, page_basis_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
tsa = torch.ops.tsa


def int32(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def keys(*shape, rank=5, noise=0.3, dtype=torch.float32):
    """Keys near a few directions, with a mean."""
    k = torch.randn(*shape[:-1], rank) @ torch.randn(rank, shape[-1]) + noise * torch.randn(shape) + 5
    return k.to(DEVICE, dtype)


def poisoned(k):
    found = empty_basis(k)
    found.basis.fill_(0xEE), found.coords.fill_(77), found.scales.fill_(torch.nan)
    return found


def rebuilt(found: PageBasis) -> torch.Tensor:
    """What is stored of keys less their page's mean: `[..., P, 16, D]`; padding is 0."""
    numbers, scales = unpack(found.basis, torch.float64), found.scales.double()
    coords = found.coords.double().masked_fill(found.coords == HIDDEN, 0)
    return torch.einsum("...rd,...ri,...r->...id", numbers, coords, scales)


def centred(k: torch.Tensor, pages: int) -> torch.Tensor:
    tiles = k[..., : 16 * pages, :].double().unflatten(-2, (pages, 16))
    return tiles - tiles.mean(-2, keepdim=True)


def error(found: PageBasis, k: torch.Tensor, pages: int) -> float:
    want = centred(k, pages)
    got = rebuilt(PageBasis(*(x[:, :, :pages] for x in found)))
    return float((got - want).norm() / want.norm())


# ---- the state


def test_numbers_are_packed_and_unpacked():
    numbers = torch.randint(-7, 8, (3, 5, 24)).float()
    assert torch.equal(unpack(pack(numbers), torch.float32), numbers)


def test_eight_rounded_directions_are_nearly_the_best_eight():
    k = torch.randn(1, 1, 16 * 200, 64)
    found = page_basis_reference(k, None, 1, None, None, None)
    values = torch.linalg.svdvals(centred(k, 200))
    best = float((values[..., 8:].square().sum() / values.square().sum()).sqrt())
    assert best < error(found, k, 200) < 1.04 * best
    few = keys(1, 1, 16 * 50, 32, rank=3, noise=0.0)
    assert error(page_basis_reference(few, None, 1, None, None, None), few, 50) < 1e-2  # more directions than it takes


def test_padding_is_left_out():
    k = keys(2, 2, 64, 16)
    mask = torch.rand(2, 64, device=DEVICE) < 0.7
    mask[0, 16:32] = False
    found = page_basis_reference(k, None, 1, int32(0, 21), int32(64, 43), mask)
    real = mask & (torch.arange(64, device=DEVICE) >= torch.tensor([0, 21], device=DEVICE)[:, None])
    assert torch.equal(found.coords[:, 0, :, 0] != HIDDEN, real.unflatten(1, (4, 16)))
    assert (found.scales[0, :, 1] == 0).all()  # a page without a key
    tile = k[1, 0, 32:48][real[1, 32:48]].double()
    part = rebuilt(found)[1, 0, 2][real[1, 32:48]]
    assert (part - (tile - tile.mean(0))).norm() < 0.3 * (tile - tile.mean(0)).norm()


@pytest.fixture(scope="module")
def append():
    pytest.importorskip("triton")
    from tsa_compile.kernels.state.append_basis.host import append_basis

    return {"reference": append_basis_reference, "triton": append_basis}


@pytest.mark.parametrize("which", ["reference", "triton"])
def test_any_order_of_appends_gives_those_of_the_whole_cache(append, which):
    k = keys(2, 1, 60, 16)
    found, begin = poisoned(k), int32(0, 0)
    for step in ((17, 5), (20, 10), (0, 1), (12, 3)):
        end = begin + int32(*step)
        known = k.masked_fill((torch.arange(60, device=DEVICE) >= end[:, None])[:, None, :, None], torch.nan)
        append[which](*found, known, None, 1, None, begin, end, None, max(step))
        begin = end
    whole = poisoned(k)
    append[which](*whole, k, None, 1, None, int32(0, 0), begin, None, 60)
    for b, pages in enumerate((begin // 16).tolist()):
        for got, want in zip(found, whole, strict=True):
            assert torch.equal(got[b, :, :pages], want[b, :, :pages])
        assert (found.basis[b, :, pages:] == 0xEE).all(), "a page that is not full was written"
        assert error(PageBasis(*(x[b : b + 1] for x in found)), k[b : b + 1], pages) < 0.2


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 24), (torch.float16, 64), (torch.bfloat16, 16)], ids=str)
def test_triton_is_as_near_as_the_reference(append, dtype, dim):
    k = keys(1, 2, 40, dim, dtype=dtype)
    want, got = page_basis_reference(k, None, 1, None, None, None), poisoned(k)
    append["triton"](*got, k, None, 1, None, int32(0), int32(40), None, 40)
    assert abs(error(got, k, 2) / error(want, k, 2) - 1) < 0.1
    same = unpack(got.basis, torch.float32)[:, :, :2, 0] == unpack(want.basis, torch.float32)[:, :, :2, 0]
    assert same.float().mean() > 0.98  # of the first direction; later ones depend on how a half was rounded before


@pytest.mark.parametrize("which", ["reference", "triton"])
def test_bases_lie_as_the_blocks_do_and_masks_hide(append, which):
    k, table = keys(6, 1, 32, 16), int32(4, 1, 0, 5).view(2, 2)
    mask = torch.ones(2, 64, dtype=torch.bool, device=DEVICE)
    mask[0, 20:24] = False
    found = poisoned(k)
    append[which](*found, k, table, 32, int32(3, 0), int32(0, 0), int32(64, 40), mask, 64)
    plain = page_basis_reference(k, None, 1, None, None, None)
    for owner, page, written in ((1, 0, 1), (1, 1, 1), (0, 0, 1), (0, 1, 1), (5, 0, 0), (2, 0, 0)):
        assert (found.basis[owner, :, page] != 0xEE).any() == bool(written)
        if written:
            one = k[owner : owner + 1, :, 16 * page :]
            near = [error(PageBasis(*(t[owner : owner + 1, :, page:] for t in x)), one, 1) for x in (found, plain)]
            assert abs(near[0] / near[1] - 1) < 0.1
    hidden = found.coords[4, 0, :, 0] == HIDDEN
    assert hidden.nonzero()[:, 1].tolist() == [0, 1, 2, 4, 5, 6, 7]


# ---- scores


def case(heads=6, kv_heads=2, rows=1, capacity=1100, dim=24, dtype=torch.float32, lengths=(1100, 333, 7)):
    q = torch.randn(3, heads, rows, dim, device=DEVICE).to(dtype)
    k, n = keys(3, kv_heads, capacity, dim, dtype=dtype), int32(*lengths)
    view = (None, 1, None, n)
    mask = torch.rand(3, capacity, device=DEVICE) < 0.9
    mask[0, 32:48] = False
    sums, counts = tsa.page_sums(k, *view, mask)
    logits, parts = tsa.page_scores(q, sums, counts, *view, capacity, 0.3)
    lists = tsa.select_pages(logits, parts, counts, *view, capacity, kv_heads, [0.3], [0], 0.0, 0, 1)
    return q, k, mask, view, (q, logits, counts, *tsa.page_basis(k, *view, mask)), lists


def test_a_refined_mass_is_that_of_the_rebuilt_keys():
    q, k, mask, view, given, _ = case(dtype=torch.float64)
    refined, parts = refine_scores_reference(*given, None, None, *view, 1100, 0.3)
    means = (k.masked_fill(~mask[:, None, :, None], 0)[:, :, :1088].unflatten(2, (68, 16)).sum(3)) / given[2][:, :, :68, None]
    near = rebuilt(PageBasis(*given[3:]))[:, :, :68] + means[:, :, :, None]
    logits = torch.einsum("bgqd,bgpid->bgqpi", q[:, :, 0].unflatten(1, (2, 3)), near) * 0.3
    logits = logits.masked_fill(~mask[:, :1088].unflatten(1, (68, 16))[:, None, None], -torch.inf)
    want = logits.logsumexp(-1).flatten(1, 2)
    for b, pages in enumerate((68, 20)):
        torch.testing.assert_close(refined[b, :, 0, :pages], want[b, :, :pages].float(), atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(parts[b, :, 0].logsumexp(-1), want[b, :, :pages].logsumexp(-1).float(), atol=1e-4, rtol=1e-5)
    assert (refined[0, :, 0, 2] == -torch.inf).all()  # its keys are padding
    true = torch.einsum("bgqd,bgpid->bgqpi", q[:, :, 0].unflatten(1, (2, 3)), k[:, :, :1088].unflatten(2, (68, 16))) * 0.3
    true = true.masked_fill(~mask[:, :1088].unflatten(1, (68, 16))[:, None, None], -torch.inf).logsumexp(-1).flatten(1, 2)
    there = true[0].isfinite()
    far, near = ((x[0, :, 0, :68] - true[0])[there].abs().mean() for x in (given[1], refined))
    assert near < 0.1 * far  # than by the mean key alone


def test_pages_that_are_not_listed_keep_their_logits():
    _, _, _, view, given, (indices, counts) = case()
    every, _ = refine_scores_reference(*given, None, None, *view, 1100, 0.3)
    some, _ = refine_scores_reference(*given, indices, counts, *view, 1100, 0.3)
    listed = torch.zeros(3, 2, 70, dtype=torch.bool, device=DEVICE)
    for b, g in ((b, g) for b in range(2) for g in range(2)):
        listed[b, g, indices[b, g, : counts[b, g]].long()] = True
    listed = listed[:, :, :69].repeat_interleave(3, 1)[:, :, None]
    assert torch.equal(some[:2, ..., :20], torch.where(listed, every, given[1])[:2, ..., :20])
    assert (some != every)[0].any()


@pytest.mark.parametrize(("dtype", "heads", "kv_heads", "rows"), [(torch.float32, 4, 2, 1), (torch.float16, 9, 1, 3)], ids=str)
def test_triton_scores_against_the_reference(dtype, heads, kv_heads, rows):
    pytest.importorskip("triton")
    from tsa_compile.kernels.score.page_basis.host import refine_scores

    _, _, _, view, given, lists = case(heads, kv_heads, rows, dtype=dtype)
    for which in ((None, None), lists):
        got = refine_scores(*given, *which, *view, 1100, 0.3)
        want = refine_scores_reference(*given, *which, *view, 1100, 0.3)
        for b, pages in enumerate((68, 20, 0)):
            torch.testing.assert_close(got[0][b, ..., :pages], want[0][b, ..., :pages], rtol=1e-4, atol=1e-4)
            chunks = -(-pages // 64)
            torch.testing.assert_close(got[1][b, ..., :chunks], want[1][b, ..., :chunks], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dim", "group", "parts"), [(26, 1, 1), (32, 7, 3), (10, 3, 40)])
def test_any_share_of_a_list_by_blocks_and_words(dim, group, parts):
    """Lists that are empty, one page, all in a chunk, or all pages; more parts than entries; rows of an odd number of bytes."""
    pytest.importorskip("triton")
    from tsa_compile.kernels.score.page_basis.host import CONFIG, refine_scores

    k, q = keys(8, 1, 1600, dim), torch.randn(4, group, 1, dim, device=DEVICE)
    table = torch.randperm(8, device=DEVICE).to(torch.int32).view(4, 2)
    view = (table, 1600, int32(0, 5, 0, 0), int32(3200, 3000, 2100, 40))
    sums, counts = tsa.page_sums(k, None, 1, None, None, None)
    basis = tsa.page_basis(k, None, 1, None, None, None)
    logits, _ = tsa.page_scores(q, sums, counts, *view, 3200, 0.3)
    indices = torch.full((4, 1, 200), 10**6, dtype=torch.int32, device=DEVICE)
    lists = [torch.arange(200), torch.arange(64, 128), torch.tensor([130]), torch.tensor([])]
    for b, pages in enumerate(lists):
        indices[b, 0, : len(pages)] = pages.to(indices)
    given = (q, logits, counts, *basis, indices, int32(*map(len, lists)).view(4, 1), *view, 3200, 0.3)
    got, want = refine_scores(*given, config=CONFIG._replace(tile=16, resident=parts)), refine_scores_reference(*given)
    for b, pages in enumerate((200, 187, 131, 2)):
        torch.testing.assert_close(got[0][b, ..., :pages], want[0][b, ..., :pages], rtol=1e-4, atol=1e-4)
        chunks = -(-pages // 64)
        torch.testing.assert_close(got[1][b, ..., :chunks], want[1][b, ..., :chunks], rtol=1e-4, atol=1e-4)


def test_opcheck_and_wrong_arguments():
    q, k, mask, view, given, lists = case()
    torch.library.opcheck(tsa.page_basis.default, (k[:, :, :64], None, 1, None, None, mask[:, :64]))
    torch.library.opcheck(tsa.refine_scores.default, (*given, *lists, *view, 1100, 0.3))
    torch.library.opcheck(tsa.refine_scores.default, (*given, None, None, *view, 1100, 0.3))
    bounds = int32(0, 0, 0), int32(1100, 333, 7)
    append = (*empty_basis(k), k, None, 1, None, *bounds, mask, 1100)
    torch.library.opcheck(tsa.append_basis.default, append, test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(ValueError, match=r"tsa::page_basis: the head dim must be even.*got 25"):
        tsa.page_basis(torch.randn(1, 1, 32, 25), None, 1, None, None, None)
    with pytest.raises(ValueError, match=r"tsa::append_basis: coords must be torch.int8"):
        tsa.append_basis(append[0], append[1].int(), *append[2:])
    with pytest.raises(ValueError, match="tsa::refine_scores: indices and list_counts"):
        tsa.refine_scores(*given, lists[0], None, *view, 1100, 0.3)
    with pytest.raises(ValueError, match="tsa::refine_scores: logits must be"):
        tsa.refine_scores(q, given[1][..., :5], *given[2:], *lists, *view, 1100, 0.3)
