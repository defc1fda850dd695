"""Token selection on the GPU, from scores: launches of the coverage count and of the selection (docs/operators.md)."""

from __future__ import annotations

import functools
import struct
from typing import NamedTuple

import torch

from tsa_compile.kernels.common.launcher import Launch
from tsa_compile.kernels.common.sizes import cdiv
from tsa_compile.kernels.types import KvView, TokenRule, Tokens

Tensor = torch.Tensor
MASS_ROW, BINS = 2052, 256  # as the kernels have them
POOL_HEADS, POOL_BLOCK, COUNT_BLOCK = 32, 32, 4096
CHUNK, SELECT_BLOCK = 8192, 2048  # scores of one program; scores at a time
POOL_WARPS, COUNT_WARPS, SELECT_WARPS = 8, 16, 8


def select_from_means(
    mean: Tensor, q_len: int, view: KvView, rule: TokenRule, lists: int, zeroed: Zeroed | None = None
) -> Tokens:
    """Steps 3 (pooling) to 7 of the contract, from the mean attention float32 `[B, H, Lk]` by rank (`last_query_scores`)."""
    batch, heads, k_len = mean.shape
    padded, heavy = view.ranks is not None, rule.heavy
    run = _launches(mean.shape, q_len, lists, padded, rule, (POOL_HEADS, COUNT_BLOCK, CHUNK, SELECT_BLOCK))
    new = lambda *shape, dtype=torch.int32: torch.empty(shape, dtype=dtype, device=mean.device)  # noqa: E731
    scores = torch.empty_like(mean)
    masses, candidates = (new(batch, k_len, dtype=torch.int64) for _ in range(2))  # each aligned: a kernel is compiled by that
    counts, indices, heavy_indices = new(batch), new(batch, lists, k_len), new(batch, lists, heavy)
    order, ranks = view.order if padded else (counts, counts)  # not read
    mass_bins, cuts, _ = zeroed or zeros(batch, lists, 0, mean.device)
    run.pool(mean, scores, masses, mass_bins, ranks)
    run.coverage(masses, candidates, mass_bins, counts, ranks)
    if lists < heads:
        scores = scores.unflatten(1, (lists, -1)).sum(2)
    gathered = new(2 if heavy else 1, batch, lists, k_len, dtype=torch.float32)
    if run.select is not None:
        run.select(scores, gathered, counts, indices, heavy_indices, order, ranks)
        return Tokens(indices, counts, heavy_indices)
    bins = new(batch, lists, run.chunks, BINS)
    run.bin(scores, bins, ranks)
    run.cut(scores, bins, gathered, cuts, counts, ranks)
    run.write(scores, bins, gathered, cuts, counts, indices, heavy_indices, order, ranks)
    return Tokens(indices, counts, heavy_indices)


class _Launches(NamedTuple):
    """Of scores of one shape. `select`: of rows of one chunk, in place of `bin`, `cut` and `write`; None: there are more."""

    chunks: int
    pool: Launch
    coverage: Launch
    select: Launch | None
    bin: Launch
    cut: Launch
    write: Launch


@functools.lru_cache(maxsize=1024)
def _launches(
    mean: tuple[int, ...], q_len: int, lists: int, padded: bool, rule: TokenRule, sizes: tuple[int, int, int, int]
) -> _Launches:
    """Of means of this shape; sizes: heads and scores at a time, as the constants of this file are."""
    from tsa_compile.kernels.select.tokens import count_device, device

    batch, heads, k_len = mean
    coverage, last_queries, pool, min_tokens, heavy = rule
    pool_heads, count_block, chunk, select_block = sizes
    chunks, kinds = cdiv(k_len, chunk), 2 if heavy else 1  # the kept, the heaviest
    coverage_bits = struct.unpack("<q", struct.pack("<d", coverage))[0]
    row = (q_len, k_len, last_queries)
    grid, numbers = (chunks * kinds * batch * lists,), (lists, *row, heavy)
    shape = {"CHUNK": chunk, "BLOCK": select_block, "PADDED": padded, "num_warps": SELECT_WARPS}
    return _Launches(
        chunks,
        Launch(
            count_device.pool_kernel, (cdiv(k_len, POOL_BLOCK) * batch,), (heads, *row, pool),
            HEADS=pool_heads, BLOCK=POOL_BLOCK, PADDED=padded, num_warps=POOL_WARPS,
        ),
        Launch(
            count_device.count_kernel, (cdiv(k_len, count_block) * batch,), (*row, min_tokens, coverage_bits),
            BLOCK=count_block, PADDED=padded, num_warps=COUNT_WARPS,
        ),
        Launch(device.select_kernel, grid, numbers, **shape) if chunks == 1 else None,
        Launch(device.bin_kernel, (chunks * batch * lists,), numbers[:-1], **shape),
        Launch(device.cut_kernel, grid, numbers, **shape),
        Launch(device.write_kernel, grid, numbers, **shape),
    )  # fmt: skip


class Zeroed(NamedTuple):
    """Bins of the masses, int64 [B, MASS_ROW]; cuts of the lists, int32 [B, G, 2, 4]; programs that are through, int32 [B, H]."""

    mass_bins: Tensor
    cuts: Tensor
    through: Tensor


def zeros(batch: int, lists: int, heads: int, device: torch.device) -> Zeroed:
    """What must be zero before the kernels run, by one kernel."""
    sizes = [2 * batch * MASS_ROW, 8 * batch * lists, batch * heads]
    mass_bins, cuts, through = torch.zeros(sum(sizes), dtype=torch.int32, device=device).split(sizes)
    return Zeroed(mass_bins.view(torch.int64), cuts, through)


def select_everything(k: Tensor, view: KvView, heavy: int, lists: int) -> Tokens:
    """Every real token in each of `lists` lists, where the host knows that nothing is dropped."""
    batch, k_len = k.shape[0], k.shape[2]
    slot = torch.arange(k_len, device=k.device, dtype=torch.int32)
    if view.ranks is not None:
        order, ranks = view.order
        counts = ranks[:, -1].clone() if k_len else ranks.new_zeros(batch)  # aligned: kernels are compiled by that
        row = torch.where(slot < counts[:, None], order, -1)
    else:
        counts = torch.full((batch,), k_len, dtype=torch.int32, device=k.device)
        row = slot.expand(batch, -1)
    no_heavy = torch.full((batch, lists, heavy), -1, dtype=torch.int32, device=k.device)
    return Tokens(row[:, None].repeat(1, lists, 1), counts, no_heavy)
