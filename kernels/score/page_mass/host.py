"""Launch of the means of key blocks (device.py). The contract is docs/operators.md, `key_block_means`."""

from __future__ import annotations

import functools

import torch

from tsa_compile.kernels.common.launcher import Launch
from tsa_compile.kernels.common.row_blocks import KEYS, key_block_count
from tsa_compile.kernels.common.sizes import next_power_of_2
from tsa_compile.kernels.common.view import length_of
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor


def key_block_means(
    k: Tensor, start: Tensor | None, lengths: Tensor | None, key_mask: Tensor | None, blocks: Tensor | None = None,
    block: int = 1, k_len: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(means of every 64 keys, float32 `[B, Hk, key blocks, D]`; how many keys each is of, int32 `[B, key blocks]`).

    Padding does not count. Nothing waits for the device.
    """
    batch, kv_heads, rows, dim = k.shape
    k_len = length_of(k, KvView(blocks, block, start, lengths), k_len)
    batch = batch if blocks is None else blocks.shape[0]
    key_blocks = key_block_count(k_len)
    means = torch.empty(batch, kv_heads, key_blocks, dim, dtype=torch.float32, device=k.device)
    counts = torch.empty(batch, key_blocks, dtype=torch.int32, device=k.device)
    if means.numel() == 0:
        return means, counts.zero_()
    apart = (0 if key_mask is None else key_mask.stride(0), 0 if blocks is None else blocks.stride(0))
    given = (start is not None, lengths is not None, key_mask is not None)
    launch = _launch(batch, kv_heads, rows, dim, k.stride(), k_len, block, *apart, *given)
    launch(k, means, counts, *[k if x is None else x for x in (start, lengths, key_mask)], blocks)
    return means, counts


@functools.lru_cache(maxsize=1024)
def _launch(
    batch: int, kv_heads: int, rows: int, dim: int, strides: tuple[int, ...], k_len: int, block: int, m_sb: int, blocks_sb: int,
    start: bool, lengths: bool, key_mask: bool,
) -> Launch:  # fmt: skip
    """Of keys `[*, kv_heads, rows, dim]` of these strides; m_sb, blocks_sb: rows of mask and table are so far apart."""
    from tsa_compile.kernels.score.page_mass.device import key_block_means_kernel

    key_blocks = key_block_count(k_len)
    numbers = (*strides, m_sb, kv_heads, k_len, key_blocks, blocks_sb, block, max(1, rows // block))
    return Launch(
        key_block_means_kernel, (key_blocks * batch * kv_heads,), numbers, D=dim, BLOCK_D=next_power_of_2(dim), KEYS=KEYS,
        START=start, LENGTH=lengths, MASK=key_mask,
    )  # fmt: skip
