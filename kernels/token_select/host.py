"""Token selection on the GPU: launches of the scores, the coverage count and the selection. docs/operators.md is the contract."""

from __future__ import annotations

import struct

import torch

from tsa_compile.kernels.token_scores.host import window_scores

Tensor = torch.Tensor
_LEVELS, _BINS = 3, 2048


def select_tokens(
    q: Tensor,
    k: Tensor,
    key_mask: Tensor | None,
    scale: float,
    coverage: float,
    window: int,
    pool: int,
    min_tokens: int,
    heavy: int,
    share: str = "head",
) -> tuple[Tensor, Tensor, Tensor]:
    """`tsa::select_tokens` by Triton: (indices `[B, G, Lk]`, counts `[B]`, heavy_indices `[B, G, heavy]`), all int32.

    Nothing waits for the device, and lengths are run-time arguments: a new length compiles nothing.
    Source: arXiv 2602.03216, section 3.

    Raises:
        ValueError: float64, which Triton's dot does not take.
    """
    if q.dtype == torch.float64:
        raise ValueError("tsa::select_tokens: float64 runs on CPU only")
    order, ranks = _order(q, k, key_mask)
    padded, k_len, lists = key_mask is not None, k.shape[2], (q if share == "head" else k).shape[1]
    if k_len <= min_tokens + window or coverage == 0 or q.shape[2] == 0:
        return select_everything(q, k, order, ranks, padded, heavy, lists)
    mean = window_scores(q, k, order, ranks, padded, scale, window)
    return select_from_means(mean, q.shape[2], order, ranks, padded, coverage, window, pool, min_tokens, heavy, lists)


def select_from_means(
    mean: Tensor,
    q_len: int,
    order: Tensor,
    ranks: Tensor,
    padded: bool,
    coverage: float,
    window: int,
    pool: int,
    min_tokens: int,
    heavy: int,
    lists: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Steps 3 (pooling) to 7 of the contract, from the mean attention float32 `[B, H, Lk]` by rank (`window_scores`)."""
    import triton

    from tsa_compile.kernels.token_select import device

    batch, heads, k_len = mean.shape
    new = lambda *shape, dtype=torch.int32: torch.empty(shape, dtype=dtype, device=mean.device)  # noqa: E731
    scores, masses = torch.empty_like(mean), new(batch, k_len, dtype=torch.int64)
    histograms = torch.zeros(batch, _LEVELS, 2, _BINS, dtype=torch.int64, device=mean.device)
    counts, indices, heavy_indices = new(batch), new(batch, lists, k_len), new(batch, lists, heavy)
    coverage_bits = struct.unpack("<q", struct.pack("<d", coverage))[0]
    grid = (triton.cdiv(k_len, 512), batch)
    device.pool_kernel[grid](mean, scores, masses, histograms, ranks, heads, q_len, k_len, window, pool, BLOCK=512, PADDED=padded)
    for level in (1, 2):
        device.mass_level_kernel[(triton.cdiv(k_len, 2048), batch)](
            masses,
            histograms,
            ranks,
            q_len,
            k_len,
            window,
            min_tokens,
            coverage_bits,
            LEVEL=level,
            BLOCK=2048,
            PADDED=padded,
        )
    device.count_kernel[(batch,)](
        masses, histograms, counts, ranks, q_len, k_len, window, min_tokens, coverage_bits,
        BLOCK=4096, PADDED=padded, num_warps=16,
    )  # fmt: skip
    if lists < heads:
        scores = scores.unflatten(1, (lists, -1)).sum(2)
    device.select_kernel[(batch * lists, 2 if heavy else 1)](
        scores, counts, indices, heavy_indices, order, ranks, lists, q_len, k_len, window, min_tokens, heavy,
        BLOCK=4096, PADDED=padded, num_warps=16,
    )  # fmt: skip
    return indices, counts, heavy_indices


def select_everything(
    q: Tensor, k: Tensor, order: Tensor, ranks: Tensor, padded: bool, heavy: int, lists: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Every real token in each of `lists` lists, where the host knows that nothing is dropped."""
    batch, k_len = q.shape[0], k.shape[2]
    if padded:
        counts = ranks[:, -1].contiguous() if k_len else ranks.new_zeros(batch)
        slot = torch.arange(k_len, device=q.device, dtype=torch.int32)
        row = torch.where(slot < counts[:, None], order, -1)
    else:
        counts = torch.full((batch,), k_len, dtype=torch.int32, device=q.device)
        row = torch.arange(k_len, device=q.device, dtype=torch.int32).expand(batch, -1)
    indices = row[:, None].repeat(1, lists, 1)
    return indices, counts, torch.full((batch, lists, heavy), -1, dtype=torch.int32, device=q.device)


def _order(q: Tensor, k: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(real positions, then padding; running count of the real), int32 `[B, Lk]`; unread dummies without padding."""
    if key_mask is None:
        dummy = torch.empty(1, dtype=torch.int32, device=q.device)
        return dummy, dummy
    from tsa_compile.kernels.sparse_prefill.strip import rank_order

    if k.shape[2] == 0:
        empty = torch.empty(k.shape[0], 0, dtype=torch.int32, device=q.device)
        return empty, empty
    return rank_order(key_mask)
