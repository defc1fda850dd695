"""Launch of the choice of key blocks (device.py). The contract is docs/operators.md, `select_key_blocks`."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from tsa_compile.kernels.common.row_blocks import ROWS, finest_pool, row_block_count, word_count
from tsa_compile.kernels.common.tiles import LOG2_E, precision

Tensor = torch.Tensor


def select_key_blocks(
    q: Tensor,
    means: Tensor,
    counts: Tensor,
    start: Tensor | None,
    lengths: Tensor | None,
    key_mask: Tensor | None,
    k_len: int,
    scale: float,
    alpha: Sequence[float],
    pool: int,
    window: int,
    sinks: int,
    last_dense: int,
    share: str = "head",
    lookahead: bool = True,
) -> Tensor:
    """`tsa::select_key_blocks` by Triton: int64 `[B, H or Hk, row blocks, words]`. Nothing waits for the device.

    Raises:
        ValueError: too many score rows for the head dim: `pool` is below `finest_pool`.
    """
    import triton

    from tsa_compile.kernels.select.threshold_pages.device import select_key_blocks_kernel

    (batch, heads, q_len, dim), kv_heads = q.shape, means.shape[1]
    if pool < finest_pool(dim):
        raise ValueError(f"pool: {pool}; allowed on a GPU with head dim {dim}: from {finest_pool(dim)} on")
    row_blocks, words = row_block_count(q_len, k_len), word_count(k_len)
    bits = torch.empty(batch, heads, row_blocks, words, dtype=torch.int64, device=q.device)
    together, warps = tile(pool, dim)
    block_d = max(16, triton.next_power_of_2(dim))
    by_head = len(set(alpha)) > 1
    if bits.numel() > 0:
        select_key_blocks_kernel[(triton.cdiv(row_blocks, together) * batch * heads,)](
            q, means, counts, bits, *(q if x is None else x for x in (start, lengths, key_mask)),
            logs_on(tuple(alpha), q.device) if by_head else q, *q.stride(), 0 if key_mask is None else key_mask.stride(0),
            heads, kv_heads, q_len, k_len, row_blocks, means.shape[2], words, scale * LOG2_E, log2(alpha[0]),
            window, sinks, last_dense, 0 if lookahead else ROWS,
            D=dim, BLOCK_D=block_d, POOL=pool, PER=ROWS // pool, ROW_BLOCKS=together, STEP=step(block_d, q.dtype),
            START=start is not None, LENGTH=lengths is not None, MASK=key_mask is not None,
            BY_HEAD=by_head,
            POOLING=precision(q.dtype), PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
            num_warps=warps, num_stages=2 if dim <= 128 else 1,
        )  # fmt: skip
    return bits if share == "head" else union_by_group(bits, kv_heads)


def step(block_d: int, dtype: torch.dtype) -> int:
    """Queries that are summed at a time: 32 KiB of them."""
    return min(ROWS, max(16, (32 << 10) // (block_d * dtype.itemsize)))


def tile(pool: int, dim: int) -> tuple[int, int]:
    """(row blocks of a program, its warps): 64 score rows or those of a row block; 16 above head dim 128."""
    per, rows = ROWS // pool, 64 if dim <= 128 else 16
    return max(1, min(16, rows // per)), 4 if per <= 64 else 8


def union_by_group(bits: Tensor, kv_heads: int) -> Tensor:
    """The blocks that any query head of a KV head keeps: `[B, H, ...]` -> `[B, Hk, ...]`."""
    return functools.reduce(torch.bitwise_or, bits.unflatten(1, (kv_heads, -1)).unbind(2)).contiguous()


def log2(alpha: float) -> float:
    return math.log2(alpha) if alpha > 0 else -math.inf


@functools.lru_cache(64)
def logs_on(alpha: tuple[float, ...], device: torch.device) -> Tensor:
    """Logarithms of the heads' alphas on the device; copied once, so that no later call waits."""
    return torch.tensor([log2(a) for a in alpha], dtype=torch.float32, device=device)
