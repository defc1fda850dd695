"""Projected keys: rotation undone, the index of a cache, page scores and joined lists; Triton against the references."""

from __future__ import annotations

import math

import pytest
import torch

from tsa_compile.kernels import ops  # noqa: F401
from tsa_compile.kernels.common.rotation import before_rotation
from tsa_compile.kernels.score.projected.reference import projected_scores_reference
from tsa_compile.kernels.select.joined_pages.reference import join_pages_reference
from tsa_compile.kernels.state.append_projected.reference import append_projected_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TURNS = {"half": (8, False, 1.0), "interleaved": (8, True, 1.0), "partial": (3, False, 1.3), "some pairs": (5, True, 0.7)}
HEADS = (1, 0, 1)  # of the lists


def int32(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def rotated(x, positions, frequencies, interleaved, factor):
    """By the definition, one pair after the other, in float64."""
    out, n = x.double().clone(), len(frequencies)
    for i, f in enumerate(frequencies):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, n + i)
        angle = (positions.float() * f).double()
        out[..., a] = factor * (x[..., a] * angle.cos() - x[..., b] * angle.sin())
        out[..., b] = factor * (x[..., b] * angle.cos() + x[..., a] * angle.sin())
    return out


def frequencies_of(turn):
    return torch.rand(TURNS[turn][0], device=DEVICE).mul(-6).exp()


@pytest.fixture(scope="module")
def functions():
    pytest.importorskip("triton")
    from tsa_compile.kernels.score.projected.host import projected_scores
    from tsa_compile.kernels.select.joined_pages.host import join_pages
    from tsa_compile.kernels.state.append_projected.host import append_projected

    references = (append_projected_reference, projected_scores_reference, join_pages_reference)
    return {"reference": references, "triton": (append_projected, projected_scores, join_pages)}


bf16_on_gpu = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # Triton's interpreter multiplies bf16 wrongly
WHICH = pytest.mark.parametrize("which", ["reference", "triton"])


@pytest.mark.parametrize("turn", TURNS)
def test_rotation_is_undone(turn):
    _, interleaved, factor = TURNS[turn]
    frequencies = frequencies_of(turn).cpu()
    x, positions = torch.randn(2, 3, 9, 16, dtype=torch.float64), torch.randint(0, 130_000, (2, 1, 9))
    turned = rotated(x, positions, frequencies, interleaved, factor)
    assert (turned - x).norm() > 0.1
    torch.testing.assert_close(before_rotation(turned, positions, frequencies, interleaved, factor), x, rtol=1e-9, atol=1e-9)


# ---- the index


def case(turn="half", batch=2, length=150, dim=16, r=4, dtype=torch.float32):
    """(index of poison, weights, keys before rotation, keys, their positions, how they are rotated)."""
    frequencies, (_, interleaved, factor) = frequencies_of(turn), TURNS[turn]
    before = torch.randn(batch, 2, length, dim, device=DEVICE)
    positions = torch.randint(0, 90_000, (batch, length), device=DEVICE)
    k = rotated(before, positions[:, None], frequencies, interleaved, factor).to(dtype)
    index = torch.full((batch, 3, length, r), torch.nan, device=DEVICE, dtype=dtype)
    state = (index, int32(-7).expand(batch, 1, length).clone(), int32(-7).expand(batch, 1, -(-length // 16)).clone())
    weights = tuple((torch.randn(3, r, dim, device=DEVICE) / 4).to(dtype) for _ in range(2))
    return state, weights, before, k, positions, (frequencies, (HEADS, interleaved, factor))


CASES = pytest.mark.parametrize(
    ("which", "turn"), [*(("reference", turn) for turn in TURNS), ("triton", "half"), ("triton", "some pairs")]
)


@CASES
def test_any_order_of_appends_gives_the_projection_of_keys_before_rotation(functions, which, turn):
    state, weights, before, k, positions, (frequencies, rule) = case(turn)
    key_mask, begin = torch.rand(2, 150, device=DEVICE) < 0.7, int32(0, 0)
    for step in ((37, 5), (12, 1), (70, 90)):
        end, new = begin + int32(*step), max(step)
        known = k.masked_fill((torch.arange(150, device=DEVICE) >= end[:, None])[:, None, :, None], torch.nan)
        rows = (begin[:, None] + torch.arange(new, device=DEVICE)).clamp(max=149)
        functions[which][0](*state, *weights, frequencies, known, positions.gather(1, rows), begin, end, key_mask, new, *rule)
        begin = end
    want = before[:, list(HEADS)] @ weights[1].mT
    for b, end in enumerate(begin.tolist()):
        torch.testing.assert_close(state[0][b, :, :end], want[b, :, :end], rtol=1e-4, atol=1e-4)
        assert torch.equal(state[1][b, 0, :end].long(), positions[b, :end])
        assert torch.equal(state[2][b, 0, : end // 16], key_mask[b, : end // 16 * 16].view(-1, 16).sum(1).int())
        assert state[0][b, :, end:].isnan().all()
        assert (state[1][b, 0, end:] == -7).all()
        assert (state[2][b, 0, end // 16 :] == -7).all()


@WHICH
@pytest.mark.parametrize("dtype", [torch.float16, bf16_on_gpu])
def test_the_index_in_half_precision(functions, which, dtype):
    state, weights, _, k, positions, (frequencies, rule) = case(dtype=dtype, batch=3, dim=24, length=130, r=3)
    functions[which][0](*state, *weights, frequencies, k, positions, int32(0, 0, 0), int32(130, 66, 0), None, 130, *rule)
    exact = before_rotation(k.double(), positions[:, None], frequencies, rule[1], rule[2])
    want = exact[:, list(HEADS)] @ weights[1].double().mT
    tolerance = {torch.float16: 3e-3, torch.bfloat16: 3e-2}[dtype]
    for b, end in enumerate((130, 66, 0)):
        torch.testing.assert_close(state[0][b, :, :end].double(), want[b, :, :end], rtol=tolerance, atol=tolerance)
        assert (state[2][b, 0, : end // 16] == 16).all()


# ---- scores


@CASES
def test_a_page_has_the_mass_of_its_keys(functions, which, turn):
    state, (query, _), _, _, positions, (frequencies, (_, interleaved, factor)) = case(turn, length=1100)
    index, kept = torch.randn_like(state[0]), torch.rand(2, 1100, device=DEVICE) < 0.8
    state[1][:, 0] = positions
    kept[:, 160:176] = False
    index[1, :, 40] = torch.inf
    before, heads = torch.randn(2, 4, 1, 16, device=DEVICE), (3, 0, 2)
    start, lengths = int32(0, 21), int32(1100, 600)
    own = positions.gather(1, (start + lengths - 1)[:, None].long())[:, None]
    q = rotated(before, own, frequencies, interleaved, factor).float()
    logits, parts = functions[which][1](q, index, state[1], query, frequencies, start, lengths, kept, heads, interleaved, factor)
    z = torch.einsum("bhd,hrd,bhlr->bhl", before[:, list(heads), 0], query, index.nan_to_num(posinf=0)).double()
    for b, (begin, end) in enumerate(((0, 1100), (21, 621))):
        for p in range(end // 16):
            rows = [j for j in range(16 * p, 16 * p + 16) if j >= begin and kept[b, j] and (b, j) != (1, 40)]
            want = z[b, :, rows].logsumexp(-1) if rows else torch.full((3,), -torch.inf, dtype=torch.float64)
            torch.testing.assert_close(logits[b, :, 0, p].double(), want.to(DEVICE), rtol=1e-3, atol=1e-3)
        whole = torch.nn.functional.pad(logits[b, :, 0, : end // 16], (0, -(end // 16) % 64), value=-torch.inf)
        sums = whole.unflatten(1, (-1, 64)).logsumexp(-1)
        torch.testing.assert_close(parts[b, :, 0, : sums.shape[1]], sums, rtol=1e-4, atol=1e-4)


# ---- top-p without sorting, and lists joined


def top_p_by_sorting(shares, mass):
    """The definition: heaviest first, until they hold `mass` of all."""
    held, chosen, total = 0.0, [], math.fsum(shares)
    for p in sorted(range(len(shares)), key=lambda p: (-shares[p], p)):
        if held >= mass * total:
            break
        held, chosen = held + shares[p], [*chosen, p]
    return sorted(chosen)


def test_lists_without_sorting_are_those_by_sorting():
    """Shares are powers of two, so that all sums are exact, and equal ones are many."""
    pytest.importorskip("triton")
    from tsa_compile.kernels.select.top_pages.host import select_pages

    pages, p = 70, 0.9
    powers = torch.randint(-8, 1, (1, 2, 1, pages), device=DEVICE)
    logits = powers.float() * math.log(2)
    parts = torch.nn.functional.pad(logits, (0, -pages % 64), value=-torch.inf).unflatten(-1, (-1, 64)).logsumexp(-1)
    counts = torch.full((1, 1, pages), 16, dtype=torch.int32, device=DEVICE)
    where = (None, 1, None, int32(16 * pages), 16 * pages)
    indices, number = select_pages(logits, parts, counts, *where, 2, [0.0], [0], p, 0, 1)
    for h in range(2):
        shares = [2.0 ** int(x) for x in powers[0, h, 0]]
        got, last, total = indices[0, h, : number[0, h]].tolist(), pages - 1, math.fsum(shares)
        assert math.fsum(shares[x] for x in got) >= p * total * (1 - 1e-6), "by definition"
        want = top_p_by_sorting(shares[:last], (p * total - shares[last]) / (total - shares[last]))
        assert got == [*want, last]  # the last page is always read, and counted first


@WHICH
def test_lists_are_joined(functions, which):
    batch, pages, capacity = 3, 70, 1111
    start, lengths = int32(0, 50, 4), int32(1111, 700, 0)
    first, last = [0, 3], [69, 46]
    kept = torch.rand(batch, 3, pages) < 0.2
    kept[1, :, :3] = kept[1, :, 47:] = kept[2] = False
    lists = torch.full((batch, 3, pages + 2), -9, dtype=torch.int32)
    for b in range(batch):
        for n in range(3):
            found = kept[b, n].nonzero()[:, 0].int()
            lists[b, n, : len(found)] = found.flip(0)
    owners, sinks, recent = (0, 2, 2), (1, 1, 0), (4, 2, 0)
    got = functions[which][2](lists.to(DEVICE), kept.sum(-1).int().to(DEVICE), start, lengths, capacity, owners, sinks, recent)
    for b in range(2):
        for g in range(3):
            want = kept[b, [n for n in range(3) if owners[n] == g]].any(0)
            want[first[b] : first[b] + sinks[g]] = want[last[b] + 1 - recent[g] : last[b] + 1] = True
            assert got[0][b, g, : got[1][b, g]].tolist() == want.nonzero()[:, 0].tolist()
    assert (got[1][2] == 0).all()


def test_opcheck():
    state, weights, _, k, positions, (frequencies, rule) = (x for x in case(length=64))
    if DEVICE == "cuda":
        pytest.skip("the CPU's")
    check, lengths = torch.library.opcheck, int32(64, 30)
    begin = lengths - 2
    placed = positions[:, :2].clone()
    check(torch.ops.tsa.append_projected.default, (*state, *weights, frequencies, k, placed, begin, lengths, None, 2, *rule))
    scores = (torch.randn(2, 4, 1, 16), torch.randn_like(state[0]), state[1], weights[0], frequencies, None, lengths, None)
    check(torch.ops.tsa.projected_scores.default, (*scores, [3, 0, 2], False, 1.0))
    lists = (torch.zeros(2, 3, 4, dtype=torch.int32), torch.ones(2, 3, dtype=torch.int32), None, lengths, 64)
    check(torch.ops.tsa.join_pages.default, (*lists, [0, 1, 1], [1, 0], [2, 1]))


def test_errors_name_the_argument():
    state, weights, _, k, positions, (frequencies, rule) = (x for x in case(length=64))
    given = (*state, *weights, frequencies, k, positions, int32(0, 0), int32(64, 64), None, 64, *rule)
    for change, message in (
        ({4: weights[1][:, :, :8]}, r"weights must be contiguous \(3, 4, 16\)"),
        ({5: frequencies.double()}, "frequencies must be float32"),
        ({7: positions[:, :5]}, r"placed must be integers \[1 or 2, 64\]"),
        ({12: (0, 1, 2)}, r"heads must be 3 of 2, got \[0, 1, 2\]"),
        ({14: 0.0}, "factor must not be 0"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.tsa.append_projected(*(change.get(n, x) for n, x in enumerate(given)))
    none = torch.zeros(1, 1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"owners must be 1 of 2 KV heads, got \[2\]"):
        torch.ops.tsa.join_pages(none, none[0], None, None, 16, [2], [0, 0], [1, 1])
