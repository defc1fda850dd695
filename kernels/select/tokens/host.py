"""Token selection on the GPU: launches of the scores, the coverage count and the selection. docs/operators.md is the contract."""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch

from tsa_compile.kernels.score.window.host import window_scores

Tensor = torch.Tensor
MASS_ROW, BINS = 2052, 256  # as the kernels have them
POOL_HEADS, POOL_BLOCK, COUNT_BLOCK = 32, 32, 4096
CHUNK, SELECT_BLOCK = 8192, 2048  # scores of one program; scores at a time
POOL_WARPS, COUNT_WARPS, SELECT_WARPS = 8, 16, 8


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
    zeroed = _zeroed(q.shape[0], lists, q.shape[1], q.device)
    mean = window_scores(q, k, order, ranks, padded, scale, window, zeroed.through)
    return select_from_means(mean, q.shape[2], order, ranks, padded, coverage, window, pool, min_tokens, heavy, lists, zeroed)


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
    zeroed: _Zeroed | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Steps 3 (pooling) to 7 of the contract, from the mean attention float32 `[B, H, Lk]` by rank (`window_scores`)."""
    import triton

    from tsa_compile.kernels.select.tokens import count_device, device

    batch, heads, k_len = mean.shape
    new = lambda *shape, dtype=torch.int32: torch.empty(shape, dtype=dtype, device=mean.device)  # noqa: E731
    scores, (masses, candidates) = torch.empty_like(mean), new(2, batch, k_len, dtype=torch.int64)
    counts, indices, heavy_indices = new(batch), new(batch, lists, k_len), new(batch, lists, heavy)
    chunks = triton.cdiv(k_len, CHUNK)
    mass_bins, cuts, _ = zeroed or _zeroed(batch, lists, 0, mean.device)
    coverage_bits = struct.unpack("<q", struct.pack("<d", coverage))[0]
    row = (q_len, k_len, window)
    count_device.pool_kernel[(triton.cdiv(k_len, POOL_BLOCK), batch)](
        mean, scores, masses, mass_bins, ranks, heads, *row, pool,
        HEADS=POOL_HEADS, BLOCK=POOL_BLOCK, PADDED=padded, num_warps=POOL_WARPS,
    )  # fmt: skip
    count_device.count_kernel[(triton.cdiv(k_len, COUNT_BLOCK), batch)](
        masses, candidates, mass_bins, counts, ranks, *row, min_tokens, coverage_bits,
        BLOCK=COUNT_BLOCK, PADDED=padded, num_warps=COUNT_WARPS,
    )  # fmt: skip
    if lists < heads:
        scores = scores.unflatten(1, (lists, -1)).sum(2)
    kinds = 2 if heavy else 1  # the kept, the heaviest
    grid = (chunks, kinds, batch * lists)
    out = (indices, heavy_indices, order, ranks, lists, *row, heavy)
    shape = {"CHUNK": CHUNK, "BLOCK": SELECT_BLOCK, "PADDED": padded, "num_warps": SELECT_WARPS}
    gathered = new(kinds, batch, lists, k_len, dtype=torch.float32)
    if chunks == 1:
        device.select_kernel[grid](scores, gathered, counts, *out, **shape)
        return indices, counts, heavy_indices
    bins = new(batch, lists, chunks, BINS)
    device.bin_kernel[(chunks, batch * lists)](scores, bins, ranks, lists, *row, **shape)
    device.cut_kernel[grid](scores, bins, gathered, cuts, counts, ranks, lists, *row, heavy, **shape)
    device.write_kernel[grid](scores, bins, gathered, cuts, counts, *out, **shape)
    return indices, counts, heavy_indices


class _Zeroed(NamedTuple):
    """Bins of the masses, int64 [B, MASS_ROW]; cuts of the lists, int32 [B, G, 2, 4]; programs that are through, int32 [B, H]."""

    mass_bins: Tensor
    cuts: Tensor
    through: Tensor


def _zeroed(batch: int, lists: int, heads: int, device: torch.device) -> _Zeroed:
    """What must be zero before the kernels run, by one kernel."""
    sizes = [2 * batch * MASS_ROW, 8 * batch * lists, batch * heads]
    mass_bins, cuts, through = torch.zeros(sum(sizes), dtype=torch.int32, device=device).split(sizes)
    return _Zeroed(mass_bins.view(torch.int64), cuts, through)


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
    from tsa_compile.kernels.attend.tokens.strip import rank_order

    if k.shape[2] == 0:
        empty = torch.empty(k.shape[0], 0, dtype=torch.int32, device=q.device)
        return empty, empty
    return rank_order(key_mask)
