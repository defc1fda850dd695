"""Launch of the choice of key blocks (device.py). The contract is docs/operators.md, `select_key_blocks`."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from tsa_compile.kernels.common.launcher import Launch
from tsa_compile.kernels.common.row_blocks import ROWS, finest_pool, key_block_count, row_block_count, word_count
from tsa_compile.kernels.common.sizes import cdiv, next_power_of_2
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
    flags: Tensor | None = None,
) -> Tensor:
    """`tsa::select_key_blocks` by Triton: int64 `[B, H or Hk, row blocks, words]`. Nothing waits for the device.

    Args:
        flags: int32 `[FLAGS + B]`, written for the attention that follows (`attend.pages.host.attend`).

    Raises:
        ValueError: too many score rows for the head dim: `pool` is below `finest_pool`.
    """
    (batch, heads, q_len, dim), kv_heads = q.shape, means.shape[1]
    alphas = tuple(alpha)
    rule = (scale, alphas, pool, window, sinks, last_dense, 0 if lookahead else ROWS)
    m_sb = 0 if key_mask is None else key_mask.stride(0)
    given = (start is not None, lengths is not None, key_mask is not None)
    row_blocks, words = row_block_count(q_len, k_len), word_count(k_len)
    bits = torch.empty(batch, heads, row_blocks, words, dtype=torch.int64, device=q.device)
    if bits.numel() > 0:
        launch = _launch(batch, heads, kv_heads, q_len, dim, q.stride(), q.dtype, k_len, m_sb, *given, *rule)
        by_head = logs_on(alphas, q.device) if len(set(alphas)) > 1 else q
        launch(q, means, counts, bits, *[q if x is None else x for x in (start, lengths, key_mask)], by_head, flags)
    return bits if share == "head" else union_by_group(bits, kv_heads)


@functools.lru_cache(maxsize=1024)
def _launch(
    batch: int, heads: int, kv_heads: int, q_len: int, dim: int, strides: tuple[int, ...], dtype: torch.dtype, k_len: int,
    m_sb: int, start: bool, lengths: bool, key_mask: bool, scale: float, alpha: tuple[float, ...], pool: int, window: int,
    sinks: int, last_dense: int, behind: int,
) -> Launch:  # fmt: skip
    """Of queries `[batch, heads, q_len, dim]` of these strides; rows of the mask are m_sb apart."""
    from tsa_compile.kernels.select.threshold_pages.device import select_key_blocks_kernel

    if pool < finest_pool(dim):
        raise ValueError(f"pool: {pool}; allowed on a GPU with head dim {dim}: from {finest_pool(dim)} on")
    row_blocks, (together, warps) = row_block_count(q_len, k_len), tile(pool, dim)
    block_d, half = max(16, next_power_of_2(dim)), dtype != torch.float32
    numbers = (
        *strides, m_sb, heads, kv_heads, q_len, k_len, row_blocks, key_block_count(k_len), word_count(k_len),
        scale * LOG2_E, log2(alpha[0]), window, sinks, last_dense, behind,
    )  # fmt: skip
    return Launch(
        select_key_blocks_kernel, (cdiv(row_blocks, together) * batch * heads,), numbers,
        D=dim, BLOCK_D=block_d, POOL=pool, PER=ROWS // pool, ROW_BLOCKS=together, STEP=step(block_d, dtype),
        START=start, LENGTH=lengths, MASK=key_mask, BY_HEAD=len(set(alpha)) > 1,
        POOLING=precision(dtype), PRECISION="tf32" if half else "tf32x3", num_warps=warps, num_stages=2 if dim <= 128 else 1,
    )  # fmt: skip


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
