"""Selection by Triton: from the same scores exactly the reference's sets; scores against float64; properties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.flat import select_tokens, select_tokens_reference
from tsa_compile.kernels.common.coverage_reference import count_dropped, largest
from tsa_compile.kernels.common.ranks import order_or_unread, rank_order, rank_order_reference, view_of_mask
from tsa_compile.kernels.score.last_queries.host import last_query_scores
from tsa_compile.kernels.score.last_queries.reference import token_scores_reference
from tsa_compile.kernels.select.tokens import host
from tsa_compile.kernels.types import IDENTITY, TokenRule

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_means(generator, heads, n, kind):
    """Means whose pooled sums are exact in float32: multiples of 2**-20."""
    if kind == "ties":
        x = torch.randint(0, 3, (heads, n), generator=generator)
    elif kind == "equal":
        x = torch.full((heads, n), 5)
    elif kind == "zero":
        x = torch.zeros(heads, n)
    elif kind == "near":  # equal after rounding to few digits, not equal
        x = (1 << 18) + torch.randint(0, 4, (heads, n), generator=generator)
    else:
        x = torch.randint(0, 1 << 18, (heads, n), generator=generator) >> torch.randint(0, 17, (heads, n), generator=generator)
    return (x.float() / (1 << 20) / 4).to(DEVICE)


def expected(mean, coverage, window, pool, min_tokens, heavy, lists):
    """Kept and heaviest ranks of one row without padding: the contract, from the means."""
    n = mean.shape[1]
    length = n + window
    everything = [list(range(length))] * lists, [[]] * lists
    if length <= min_tokens + window:
        return everything
    scores = torch.nn.functional.avg_pool1d(mean.cpu(), pool, 1, pool // 2)
    n_drop = count_dropped(scores, coverage)
    if n_drop == 0:
        return everything
    scores = scores.unflatten(0, (lists, -1)).sum(1)
    kept = largest(scores, max(min_tokens, n - (n_drop + 1))).tolist()
    tail = list(range(n, length))
    return [row + tail for row in kept], largest(scores, min(heavy, n)).tolist()


LONG = 29  # the longest of the first cases


@pytest.mark.parametrize("case", [pytest.param(n, marks=pytest.mark.slow) if n >= 50 or n == LONG else n for n in range(200)])
def test_the_same_sets_as_the_reference(case, monkeypatch):
    if case % 2:  # several programs for each list and count
        for name, size in {"CHUNK": 128, "SELECT_BLOCK": 64, "COUNT_BLOCK": 128, "POOL_HEADS": 2}.items():
            monkeypatch.setattr(host, name, size)
    g = torch.Generator().manual_seed(case)
    pick = lambda *xs: xs[int(torch.randint(len(xs), (), generator=g))]  # noqa: E731
    batch, heads, k_len = pick(1, 3), pick(1, 4), pick(20, 37, 64, 131, 700)
    window, pool, min_tokens, heavy = pick(1, 8, 13), pick(1, 3, 7), pick(1, 8, 16), pick(0, 1)
    coverage, kind = pick(0.001, 0.05, 0.5, 0.99), pick("ties", "equal", "zero", "near", "wide", "wide")
    q_len, lists = pick(k_len, max(1, k_len // 2), 1), pick(heads, heads, 1, max(1, heads // 2))
    pool = pool if lists == heads else 1  # a GPU divides by the pool to the last digit but one: sums of heads then tie or not
    mask = None
    if batch > 1:
        position = torch.arange(k_len)
        lengths = torch.randint(0, k_len + 1, (batch, 1), generator=g)
        side = pick("left", "right", "holes")
        mask = position >= k_len - lengths if side == "left" else position < lengths
        mask = torch.rand(batch, k_len, generator=g) < 0.7 if side == "holes" else mask
        mask = mask.to(DEVICE)
    means = torch.full((batch, heads, k_len), float("nan"), device=DEVICE)
    rows = []
    for b in range(batch):
        real = torch.arange(k_len) if mask is None else mask[b].nonzero().squeeze(1).cpu()
        n = max(len(real) - window, 0)
        means[b, :, :n] = random_means(g, heads, n, kind)
        has_query = bool((real >= k_len - q_len).any())
        kept, top = expected(means[b, :, :n], coverage, window, pool, min_tokens if has_query else k_len, heavy, lists)
        rows.append((real, kept if n else [list(range(len(real)))] * lists, top if n else [[]] * lists))
    rule = TokenRule(coverage, window, pool, min_tokens, heavy)
    got = host.select_from_means(means, q_len, view_of_mask(mask), rule, lists)
    for b, (real, kept, top) in enumerate(rows):
        for h in range(lists):
            want = [int(real[i]) for i in kept[h]]
            assert int(got[1][b]) == len(want), (case, b)
            assert got[0][b, h].tolist() == want + [-1] * (k_len - len(want))
            heaviest = [int(real[i]) for i in top[h]]
            assert got[2][b, h].tolist() == heaviest + [-1] * (heavy - len(heaviest))


def structured(batch, heads, kv_heads, q_len, k_len, dim, dtype, seed=0):
    """Queries and keys with sinks, local decay and a few tokens that the last queries look for."""
    g = torch.Generator().manual_seed(seed)
    k = torch.randn(batch, kv_heads, k_len, dim, generator=g)
    q = torch.randn(batch, heads, q_len, dim, generator=g)
    q += k[:, :, k_len // 3 : k_len // 3 + 1].repeat_interleave(heads // kv_heads, 1)
    k[:, :, :2] *= 2
    layout = lambda x: x.transpose(1, 2).contiguous().transpose(1, 2) if seed % 2 else x  # noqa: E731
    return layout(q).to(DEVICE, dtype), layout(k).to(DEVICE, dtype)


# Half-precision inputs are exact in float64; products accumulate in float32, so only float32's own rounding remains.
TOLERANCE = 2e-5
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "window", "q_len"), [(16, 8, 90), (80, 128, 200), (64, 5, 3), (256, 16, 200)])
@pytest.mark.parametrize("padded", [False, True])
def test_scores_against_float64(dtype, dim, window, q_len, padded):
    k_len = 200
    q, k = structured(2, 4, 2, q_len, k_len, dim, dtype, seed=dim + window)
    mask = (torch.arange(k_len, device=DEVICE) >= torch.tensor([[0], [29]], device=DEVICE)) if padded else None
    order, ranks = order_or_unread(view_of_mask(mask), q.device)
    got = last_query_scores(q, k, order, ranks, padded, dim**-0.5, window)
    for b in range(2):
        real = slice(29, None) if padded and b else slice(None)
        length = 171 if padded and b else 200
        rows = min(q_len, length)
        want = token_scores_reference(q[b].double().cpu()[:, q_len - rows :], k[b, :, real].double().cpu(), dim**-0.5, window, 1)
        error = (got[b, :, : length - window].double().cpu() - want).norm() / want.norm()
        assert error < TOLERANCE, error


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 1), (6, 2)])
@pytest.mark.parametrize(("dim", "window", "q_len"), [(64, 128, 3001), (128, 128, 3001), (128, 100, 57), (128, 128, 1500)])
def test_hopper_scores_against_float64(dim, window, q_len, heads, kv_heads, dtype):
    k_len = 3001
    q, k = structured(2, heads, kv_heads, q_len, k_len, dim, dtype, seed=dim + window)
    for holes in (None, torch.rand(2, k_len, generator=torch.Generator().manual_seed(1)) < 0.9):
        mask = None if holes is None else holes.cuda()
        got = last_query_scores(q, k, *order_or_unread(view_of_mask(mask), q.device), holes is not None, dim**-0.5, window)
        for b in range(2):
            real = torch.arange(k_len) if holes is None else holes[b].nonzero().squeeze(1)
            rows = real[real >= k_len - q_len] - (k_len - q_len)
            exact = token_scores_reference(q[b, :, rows].double(), k[b, :, real].double(), dim**-0.5, window, 1)
            error = (got[b, :, : len(real) - window].double() - exact).norm() / exact.norm()
            assert error < TOLERANCE, error


@pytest.mark.gpu
def test_hopper_scores_in_two_launches():
    """Of more programs than the GPU runs at once, which therefore cannot wait for each other."""
    batch, k_len, window = 80, 700, 128
    q, k = structured(batch, 8, 4, k_len, k_len, 128, torch.bfloat16, seed=3)
    got = last_query_scores(q, k, *order_or_unread(IDENTITY, q.device), False, 128**-0.5, window)
    for b in (0, 41, 79):
        exact = token_scores_reference(q[b].double(), k[b].double(), 128**-0.5, window, 1)
        error = (got[b, :, : k_len - window].double() - exact).norm() / exact.norm()
        assert error < TOLERANCE, error


@settings(max_examples=25, deadline=None)
@given(
    k_len=st.integers(1, 150),
    q_share=st.floats(0.01, 1),
    window=st.integers(1, 40),
    min_tokens=st.integers(1, 60),
    coverage=st.floats(0, 0.99),
    padded=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_properties_of_any_selection(k_len, q_share, window, min_tokens, coverage, padded, seed):
    q_len, heavy = max(1, int(k_len * q_share)), min(min_tokens, 4)
    q, k = structured(2, 2, 1, q_len, k_len, 16, torch.float32, seed)
    mask = (torch.rand(2, k_len, generator=torch.Generator().manual_seed(seed)) < 0.8).to(DEVICE) if padded else None
    indices, counts, heaviest = select_tokens(q, k, mask, 0.25, coverage, window, 3, min_tokens, heavy)
    for b in range(2):
        real = torch.ones(k_len, dtype=torch.bool) if mask is None else mask[b].cpu()
        positions, n = real.nonzero().squeeze(1), int(counts[b])
        assert min(len(positions), min_tokens + window) <= n <= len(positions)
        for h in range(2):
            kept = indices[b, h, :n].cpu()
            assert (indices[b, h, n:] == -1).all()
            assert (kept[1:] > kept[:-1]).all()
            assert ((kept >= 0) & (kept < k_len)).all()
            assert real[kept.long()].all()
            assert set(positions[-window:].tolist()) <= set(kept.tolist())
            top = heaviest[b, h][heaviest[b, h] >= 0].tolist()
            assert set(top) <= set(kept.tolist())
            assert top == sorted(set(top))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("share", ["head", "group"])
def test_whole_selection_agrees_with_float64_but_for_rounding_at_the_threshold(dtype, padded, share):
    q, k = structured(2, 4, 2, 300, 300, 64, dtype)
    mask = (torch.arange(300, device=DEVICE) < torch.tensor([[300], [251]], device=DEVICE)) if padded else None
    arguments = (0.125, 0.3, 16, 7, 32, 8)
    got = select_tokens(q, k, mask, *arguments, share=share)
    cpu_mask = None if mask is None else mask.cpu()
    want = select_tokens_reference(q.double().cpu(), k.double().cpu(), cpu_mask, *arguments, share=share)
    for b in range(2):
        assert abs(int(got[1][b]) - int(want[1][b])) <= 1
        assert len(got[0][b]) == len(want[0][b]) == (4 if share == "head" else 2)
        for h in range(len(got[0][b])):
            a, c = (set(x[0][b, h].tolist()) - {-1} for x in (got, want))
            assert len(a ^ c) <= 2, (b, h, a ^ c)


@pytest.mark.gpu
def test_no_synchronisation_and_graph_replay():
    q, k = structured(2, 8, 2, 4096, 4096, 128, torch.bfloat16)
    mask = torch.arange(4096, device="cuda") >= torch.tensor([[0], [900]], device="cuda")
    arguments = (0.09, 0.1, 128, 7, 256, 64)
    for m in (None, mask):
        want = select_tokens(q, k, m, *arguments)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            select_tokens(q, k, m, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = select_tokens(q, k, m, *arguments)
        for x in got:
            x.fill_(-7)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
def test_a_new_length_compiles_nothing():
    from tsa_compile.kernels.score.last_queries import device as scores
    from tsa_compile.kernels.select.tokens import count_device as count
    from tsa_compile.kernels.select.tokens import device as select

    kernels = [scores.score_lse_kernel, scores.score_mean_kernel, count.pool_kernel, count.count_kernel, select.select_kernel]

    def compiled():
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    for n, length in enumerate((2048, 2049, 3000, 3001, 4096, 5000, 1777, 6144, 7001, 8192)):
        q, k = structured(1, 4, 2, length, length, 64, torch.bfloat16)
        select_tokens(q, k, None, 0.125, 0.1, 128, 7, 256, 64)
        if n == 1:
            after_two = compiled()
    assert compiled() == after_two > 0


@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (2, 1500), (0, 5), (2, 0)])
def test_order_and_ranks_are_the_references(shape):
    for mask in (torch.rand(shape) < 0.5, torch.zeros(shape, dtype=torch.bool), torch.ones(shape, dtype=torch.bool)):
        order, ranks = rank_order(mask.to(DEVICE))
        want_order, want_ranks = rank_order_reference(mask)
        assert torch.equal(order.cpu(), want_order)
        assert torch.equal(ranks.cpu(), want_ranks)
        assert order.dtype == ranks.dtype == torch.int32
