"""Page index and page selection: references against their definition, Triton against the references."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsa_compile.kernels import ops  # noqa: F401
from tsa_compile.kernels.common.shares import share_bits
from tsa_compile.kernels.score.page_index.reference import page_scores_reference
from tsa_compile.kernels.select.top_pages.budget import budget
from tsa_compile.kernels.select.top_pages.reference import choose, page_shares, select_pages_reference
from tsa_compile.kernels.state.append_pages.reference import append_pages_reference, page_sums_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WHOLE = (None, 1, None, None)  # the view of a cache that is full


def int32(*values, device=DEVICE):
    return torch.tensor(values, dtype=torch.int32, device=device)


def index_of(*shape, device=DEVICE):
    """An index of poison: sums `[N, Hk, P, D]` and counts `[N, 1, P]`."""
    return torch.full(shape, torch.nan, device=device), torch.full(
        (shape[0], 1, shape[2]), -(10**9), dtype=torch.int32, device=device
    )


# ---- sums


def test_sums_and_counts_of_real_rows():
    k, start, end = torch.randn(2, 3, 70, 4), int32(0, 21, device="cpu"), int32(70, 66, device="cpu")
    key_mask = torch.rand(2, 70) < 0.8
    sums, counts = page_sums_reference(k, None, 1, start, end - start, key_mask)
    for b, p in ((b, p) for b in range(2) for p in range(4)):
        rows = [j for j in range(16 * p, 16 * p + 16) if start[b] <= j and key_mask[b, j]]
        assert counts[b, 0, p] == len(rows)
        torch.testing.assert_close(sums[b, :, p], k[b, :, rows].sum(1))


@pytest.fixture(scope="module")
def append():
    pytest.importorskip("triton")
    from tsa_compile.kernels.state.append_pages.host import append_pages

    return {"reference": append_pages_reference, "triton": append_pages}


@pytest.mark.parametrize("which", ["reference", "triton"])
def test_any_order_of_appends_gives_the_index_of_the_whole_cache(append, which):
    k = torch.randn(2, 2, 100, 4, device=DEVICE)
    sums, counts = index_of(2, 2, 7, 4)
    begin = int32(0, 0)
    for step in ((37, 5), (1, 12), (10, 1), (17, 40), (0, 3)):
        end = begin + int32(*step)
        known = k.masked_fill((torch.arange(100, device=DEVICE) >= end[:, None])[:, None, :, None], torch.nan)
        append[which](sums, counts, known, None, 1, None, begin, end, None, max(step))
        begin = end
    end = begin - 9  # rows are taken back and others come
    k[:, :, 52:] = torch.randn(2, 2, 48, 4, device=DEVICE)
    append[which](sums, counts, k, None, 1, None, end, end + 20, None, 20)
    whole = page_sums_reference(k, None, 1, None, end + 20, None)
    for b, pages in enumerate(((end + 20) // 16).tolist()):
        torch.testing.assert_close(sums[b, :, :pages], whole[0][b, :, :pages])
        assert (counts[b, 0, :pages] == 16).all()
        assert sums[b, :, pages:].isnan().all(), "a page that is not full was written"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_triton_sums_with_padding_and_dtypes(append, dtype):
    k = torch.randn(3, 2, 130, 24, device=DEVICE).to(dtype)
    start, end, key_mask = int32(0, 21, 3), int32(130, 66, 3), torch.rand(3, 130, device=DEVICE) < 0.8
    expected = page_sums_reference(k.double(), None, 1, start, end - start, key_mask)
    sums, counts = index_of(3, 2, 9, 24)
    append["triton"](sums, counts, k, None, 1, start, int32(0, 0, 0), end, key_mask, 130)
    for b, pages in enumerate((8, 4, 0)):
        torch.testing.assert_close(sums[b, :, :pages].double(), expected[0][b, :, :pages], rtol=1e-6, atol=1e-5)
        assert torch.equal(counts[b, :, :pages], expected[1][b, :, :pages])


@pytest.mark.parametrize("which", ["reference", "triton"])
def test_sums_lie_as_the_blocks_do(append, which):
    k, table = torch.randn(6, 2, 32, 4, device=DEVICE), int32(4, 1, 0, 5).view(2, 2)
    sums, counts = index_of(6, 2, 2, 4)
    append[which](sums, counts, k, table, 32, None, int32(0, 0), int32(64, 40), None, 64)
    for owner, page, written in ((4, 0, 1), (4, 1, 1), (1, 1, 1), (0, 1, 1), (5, 0, 0), (2, 0, 0)):
        assert (counts[owner, 0, page] == 16) == bool(written)
        if written:
            torch.testing.assert_close(sums[owner, :, page], k[owner, :, 16 * page : 16 * page + 16].sum(1))


# ---- scores


def scored(batch=2, heads=6, kv_heads=2, rows=1, capacity=200, dim=16, lengths=(200, 77), dtype=torch.float32):
    q, k = (
        torch.randn(batch, heads, rows, dim, device=DEVICE).to(dtype),
        torch.randn(batch, kv_heads, capacity, dim, device=DEVICE),
    )
    return q, k.to(dtype), int32(*lengths)


def test_a_share_is_the_softmax_over_pages_of_the_mean_key():
    q, k, lengths = (x.double() if x.is_floating_point() else x for x in scored())
    index = page_sums_reference(k, None, 1, None, lengths, None)
    shares = page_shares(*page_scores_reference(q, *index, None, 1, None, lengths, 200, 0.3), 2)
    means = k[1, 0, :64].unflatten(0, (4, 16)).mean(1)  # row 1 has 4 whole pages
    expected = torch.softmax(0.3 * q[1, :3, 0] @ means.T, -1).mean(0)
    torch.testing.assert_close(shares[1, 0, :4], expected.double(), rtol=1e-5, atol=1e-6)
    assert (shares[1, :, 4:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "rows"), [(4, 4, 1), (6, 2, 3), (16, 1, 5)])
def test_triton_scores_against_float64(dtype, heads, kv_heads, rows):
    pytest.importorskip("triton")
    from tsa_compile.kernels.score.page_index.host import page_scores

    q, k, lengths = scored(3, heads, kv_heads, rows, 1100, lengths=(1100, 333, 7), dtype=dtype)
    k[1, :, 40] = torch.inf  # its page ranks last
    index = page_sums_reference(k, None, 1, None, lengths, None)
    got = page_scores(q, *index, None, 1, None, lengths, 1100, 0.3)
    want = page_scores_reference(q.double(), index[0].double(), index[1], None, 1, None, lengths, 1100, 0.3)
    for b, pages in enumerate((68, 20, 0)):
        torch.testing.assert_close(got[0][b, ..., :pages], want[0][b, ..., :pages], rtol=1e-5, atol=1e-5)
        chunks = -(-pages // 64)
        torch.testing.assert_close(got[1][b, ..., :chunks], want[1][b, ..., :chunks], rtol=1e-5, atol=1e-5)


# ---- selection


def test_budgets_are_whole_numbers():
    assert [budget(n, share_bits(0.07), (0,)) for n in (0, 1, 14, 15, 100)] == [0, 1, 1, 2, 7]
    assert [budget(n, share_bits(0.05), (0,)) for n in (20, 21)] == [1, 2]
    assert budget(8192, share_bits(1.0), (0,)) == 8192
    assert [budget(n, 0, (3, 5, 9)) for n in (124, 125, 249, 250, 10**6)] == [3, 5, 5, 9, 9]
    assert budget(torch.tensor([124, 125, 999]), 0, (3, 5, 9)).tolist() == [3, 5, 9]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_chosen_pages(data):
    """As many as the budget says, the forced among them, the heaviest, equal ones lowest first."""
    end, keep = data.draw(st.integers(0, 700)), data.draw(st.sampled_from([0.0, 0.03, 0.3, 1.0]))
    sinks, recent, grid = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 4)), data.draw(st.sampled_from([2, 10**6]))
    begin = data.draw(st.integers(0, end))
    real = [p for p in range(begin // 16, end // 16) if 16 * p + 16 > begin]
    scores = [data.draw(st.integers(0, grid)) / grid / 50 for _ in range(end // 16)]
    chosen = choose(scores, real, begin, end, share_bits(keep), (0,), 0.0, sinks, recent)
    pages = real + ([end // 16] if end % 16 and end > begin else [])
    forced = {*real[:sinks], *(p for p in pages if p > (end - 1) // 16 - recent)}
    assert chosen == sorted(set(chosen))
    assert forced <= set(chosen) <= set(pages)
    assert len(chosen) == min(len(pages), max(len(forced), math.ceil(keep * len(pages) - 1e-7)))
    left, free = set(pages) - set(chosen), set(chosen) - forced
    for p in free:
        assert all((scores[p], -p) > (scores[o], -o) for o in left)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40), st.sampled_from([0.2, 0.9, 1.0]))
def test_the_fewest_pages_that_hold_the_mass(weights, mass):
    total = max(1, sum(weights))
    scores, end = [w / total for w in weights], 16 * len(weights)
    chosen = choose(scores, list(range(len(weights))), 0, end, 0, (0,), mass, 0, 1)
    assert sum(scores[p] for p in chosen) >= mass * sum(scores) - 1e-9
    heaviest = sorted(scores[:-1], reverse=True)[: len(chosen) - 1]
    if heaviest:
        assert scores[-1] + sum(heaviest[:-1]) < mass * sum(scores) + 1e-9, "one page fewer holds it too"


RULES = {
    "share": {"keep": [0.2]},
    "share by head": {"keep": [0.05, 0.5]},
    "number": {"table": [10]},
    "schedule": {"table": [7, 9]},
    "mass": {"mass": 0.6},
    "all": {"keep": [1.0]},
    "forced": {"keep": [0.0]},
}


SIZES = {"at once": {}, "the larger block": {"small": 16, "block": 1024}, "blocks in turn": {"small": 16, "block": 512}}
CASES = [
    *((rule, ties, "at once") for rule in RULES for ties in (False, True)),
    *((rule, True, sizes) for rule in ("share by head", "mass") for sizes in SIZES if sizes != "at once"),
]


@pytest.mark.parametrize(("rule", "ties", "sizes"), CASES)
def test_triton_chooses_what_the_reference_chooses(rule, ties, sizes, monkeypatch):
    """Logits on a grid, so that both precisions order shares alike; where they tie, by position."""
    pytest.importorskip("triton")
    from tsa_compile.kernels.select.top_pages import host
    from tsa_compile.kernels.select.top_pages.host import select_pages

    monkeypatch.setattr(host, "CONFIG", host.CONFIG._replace(**SIZES[sizes]))
    batch, kv_heads, capacity = 4, 2, 9000
    pages, lengths = -(-capacity // 16), int32(capacity, 2111, 5, 0)
    start = int32(0, 33, 0, 0)
    logits = torch.randint(0, 3 if ties else 2**20, (batch, 2, 1, pages), device=DEVICE).float() / (1 if ties else 2**16)
    logits = logits.repeat_interleave(3, 1)  # the heads of a group agree, so their mean is exact
    counts = torch.full((batch, 1, pages), 16, dtype=torch.int32, device=DEVICE)
    counts[:, :, 3:60:7] = 0
    whole = (start + lengths).clamp(max=capacity) // 16
    hidden = (torch.arange(pages, device=DEVICE) >= whole[:, None])[:, None, None] | (counts[:, None] == 0)
    logits = logits.masked_fill(hidden, -torch.inf)
    parts = torch.nn.functional.pad(logits, (0, -pages % 64), value=-torch.inf).unflatten(-1, (-1, 64)).logsumexp(-1)
    numbers = {"keep": [0.0], "table": [0], "mass": 0.0} | RULES[rule]
    arguments = (counts, None, 1, start, lengths, capacity, kv_heads, *numbers.values(), 1, 3)
    want = select_pages_reference(logits, parts, *arguments)
    poison = logits.masked_fill((torch.arange(pages, device=DEVICE) >= whole[:, None])[:, None, None], torch.nan)
    got = select_pages(poison, parts, *arguments)
    if rule != "mass":
        assert torch.equal(got[1], want[1])
    for b in range(batch):
        for g in range(kv_heads):
            n, expected = got[0][b, g, : got[1][b, g]].tolist(), want[0][b, g, : want[1][b, g]].tolist()
            assert abs(len(n) - len(expected)) <= (rule == "mass" and 2)  # float32 shares differ in the last digit
            assert set(n) <= set(expected) or set(expected) <= set(n)
            assert n == sorted(n)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_lists_of_any_scores(data):
    """Of shares from 0 to 1, few or many alike, some of them always read, some no page: the first so many of the sorted ones."""
    pytest.importorskip("triton")
    from tsa_compile.kernels.select.top_pages import host

    always = 1 << 30
    bits = torch.tensor([0.0, 1e-30, 1e-4, 1.0001e-4, 0.5, 1.0]).view(torch.int32).tolist()
    values = st.sampled_from([*bits, -1]) | st.integers(bits[2], bits[2] + 9)
    scores = data.draw(st.lists(st.tuples(values, st.booleans()), min_size=1, max_size=150))
    scores = [x + always * (x >= 0 and data.draw(st.integers(0, 5)) == 0 and forced) for x, forced in scores]
    keep, number = data.draw(st.sampled_from([0.0, 0.1, 1.0])), data.draw(st.integers(0, 40))
    real = [x for x in scores if x >= 0]
    wanted = min(len(real), max(sum(x >= always for x in real), math.ceil(keep * len(real) - 1e-7) + number))
    chosen = sorted(sorted((p for p, x in enumerate(scores) if x >= 0), key=lambda p: (-scores[p], p))[:wanted])
    room = torch.full((1, -(-len(scores) // 16) * 16), 7, dtype=torch.int32, device=DEVICE)
    room[0, : len(scores)] = int32(*scores)
    indices, counts = torch.full((1, 1, 150), -5, dtype=torch.int32, device=DEVICE), int32(-5).view(1, 1)
    late = host.CONFIG._replace(early=False)  # alone
    config = data.draw(st.sampled_from([late, late._replace(small=16, block=64)]))
    host.launch_lists(room, indices, counts, (*WHOLE, 16 * len(scores)), ([keep], [number], 0.0, 0, 1), config)
    assert indices[0, 0, : int(counts[0, 0])].tolist() == chosen
    assert (indices[0, 0, int(counts[0, 0]) :] == -5).all(), "written behind the list"


def test_opcheck():
    q, k, _ = (x.cpu() for x in scored(capacity=192))
    lengths, check = int32(192, 77, device="cpu"), torch.library.opcheck
    check(torch.ops.tsa.page_sums.default, (k, *WHOLE, None))
    index = torch.ops.tsa.page_sums(k, *WHOLE, None)
    check(torch.ops.tsa.append_pages.default, (*index, k, None, 1, None, lengths - 1, lengths, None, 1))
    check(torch.ops.tsa.page_scores.default, (q, *index, *WHOLE, 192, 0.3))
    scores = torch.ops.tsa.page_scores(q, *index, *WHOLE, 192, 0.3)
    check(torch.ops.tsa.select_pages.default, (*scores, index[1], *WHOLE, 192, 2, [1.0], [0], 0.0, 1, 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": [1.5]}, "keep must be one share"),
        ({"keep": [0.5, 0.5, 0.5]}, "one for each of 2 KV heads"),
        ({"recent": 0}, "recent >= 1"),
        ({"kv_heads": 4}, "kv_heads must divide 6 heads, got 4"),
        ({"capacity": 300}, "logits must be contiguous float32 .B, H, rows, 19."),
    ],
)
def test_errors_name_the_argument(changes, message):
    q, k, _ = (x.cpu() for x in scored())
    index = torch.ops.tsa.page_sums(k, *WHOLE, None)
    logits, parts = torch.ops.tsa.page_scores(q, *index, *WHOLE, 200, 0.3)
    given = {"logits": logits, "parts": parts, "counts": index[1], "blocks": None, "block": 1, "start": None, "lengths": None}
    given |= {"capacity": 200, "kv_heads": 2, "keep": [0.5], "table": [0], "mass": 0.0, "sinks": 1, "recent": 3} | changes
    with pytest.raises(ValueError, match=message):
        torch.ops.tsa.select_pages(**given)
