"""The operators against a second, literal float64 transcription of the paper's algorithm (arXiv 2602.03216)."""

import math

import pytest
import torch

from tsa_compile.kernels import ops  # noqa: F401


def paper(q, k, v, tau, window, pool, min_tokens):
    """One row [H, L, D], all heads; loops and sorts as the text has them. Returns (outputs, kept sets)."""
    heads, length, dim = q.shape
    groups = heads // k.shape[0]
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    n = length - window
    everything = [list(range(length))] * heads
    sets = everything
    if length > min_tokens + window and tau > 0:
        scores = torch.zeros(heads, n, dtype=torch.float64)
        for h in range(heads):
            rows = []
            for i in range(length - window, length):
                rows.append(torch.softmax(q[h, i] @ k[h, : i + 1].T / math.sqrt(dim), 0)[:n])
            mean = torch.stack(rows).mean(0)
            padded = torch.cat([torch.zeros(pool // 2), mean, torch.zeros(pool // 2)])
            scores[h] = torch.stack([padded[i : i + pool].sum() / pool for i in range(n)])
        mean = scores.mean(0) / scores.mean(0).sum()
        n_drop = int((mean.sort().values.cumsum(0) < tau).sum())
        if n_drop:
            n_keep = max(min_tokens, n - (n_drop + 1))
            sets = []
            for h in range(heads):
                order = sorted(range(n), key=lambda i, h=h: (-scores[h, i].item(), i))
                sets.append(sorted(order[:n_keep]) + list(range(n, length)))
    out = torch.zeros_like(q)
    for h in range(heads):
        s = torch.tensor(sets[h])
        for position, i in enumerate(sets[h]):
            seen = s[: position + 1]
            out[h, i] = torch.softmax(q[h, i] @ k[h, seen].T / math.sqrt(dim), 0) @ v[h, seen]
    return out, sets


@pytest.mark.parametrize("case", range(24))
def test_the_paper_to_the_letter(case):
    g = torch.Generator().manual_seed(case)
    pick = lambda *xs: xs[int(torch.randint(len(xs), (), generator=g))]  # noqa: E731
    length, kv_heads, groups = pick(1, 17, 40, 61, 90, 130), pick(1, 2), pick(1, 2, 4)
    window, pool, min_tokens, tau = pick(1, 4, 9), pick(1, 3, 7), pick(1, 5, 20), pick(0.0, 0.005, 0.05, 0.3, 0.9)
    make = lambda h: torch.randn(1, h, length, 16, dtype=torch.float64, generator=g) * pick(0.5, 2.0)  # noqa: E731
    q, k, v = make(kv_heads * groups), make(kv_heads), make(kv_heads)
    out, sets = paper(q[0], k[0], v[0], tau, window, pool, min_tokens)
    selection = torch.ops.tsa.select_tokens(q, k, None, None, 0.25, tau, window, pool, min_tokens, 0)
    count = int(selection[1][0])
    assert selection[0][0, :, :count].tolist() == sets
    assert (selection[0][0, :, count:] == -1).all()
    got = torch.ops.tsa.token_sparse_attention(q, k, v, None, 0.25, tau, window, pool, min_tokens, 0, 0, 0, "auto")
    torch.testing.assert_close(got[0], out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_a_padded_row_gives_what_the_row_without_padding_gives(side):
    torch.manual_seed(1)
    q, k, v = (torch.randn(3, h, 80, 16, dtype=torch.float64) for h in (4, 2, 2))
    position = torch.arange(80)
    mask = torch.stack([position >= 0, position >= 23, position >= 80])
    mask = {"left": mask, "right": mask.flip(1), "holes": torch.rand(3, 80) > torch.tensor([[0.0], [0.3], [1.0]])}[side]
    args = (0.25, 0.1, 8, 3, 16)
    padded = torch.ops.tsa.token_sparse_attention(q, k, v, mask, *args, 8, 2, 4, "auto")
    for b in range(3):
        real = mask[b]
        row = [x[b : b + 1, :, real] for x in (q, k, v)]
        alone = torch.ops.tsa.token_sparse_attention(*row, None, *args, 8, 2, 4, "auto")
        torch.testing.assert_close(padded[b][:, real], alone[0], rtol=1e-12, atol=1e-12)
        assert (padded[b][:, ~real] == 0).all()


def test_queries_are_the_last_positions():
    torch.manual_seed(2)
    q, k, v = (torch.randn(1, h, 80, 16, dtype=torch.float64) for h in (4, 2, 2))
    args = (None, 0.25, 0.1, 8, 3, 16, 8, 2, 4, "auto")
    whole = torch.ops.tsa.token_sparse_attention(q, k, v, *args)
    last = torch.ops.tsa.token_sparse_attention(q[:, :, 50:], k, v, *args)
    torch.testing.assert_close(last, whole[:, :, 50:], rtol=1e-12, atol=1e-12)


def test_coverage_zero_is_dense_attention():
    q, k, v = (torch.randn(2, 4, 60, 16, dtype=torch.float64) for _ in range(3))
    got = torch.ops.tsa.token_sparse_attention(q, k, v, None, 0.25, 0.0, 4, 3, 8, 0, 0, 0, "auto")
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
