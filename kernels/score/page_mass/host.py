"""Launch of the means of key blocks (device.py). The contract is docs/operators.md, `key_block_means`."""

from __future__ import annotations

import torch

from tsa_compile.kernels.common.row_blocks import KEYS, key_block_count
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
    import triton

    from tsa_compile.kernels.score.page_mass.device import key_block_means_kernel

    (batch, kv_heads, rows, dim), k_len = k.shape, length_of(k, KvView(blocks, block, start, lengths), k_len)
    batch = batch if blocks is None else blocks.shape[0]
    key_blocks = key_block_count(k_len)
    means = torch.empty(batch, kv_heads, key_blocks, dim, dtype=torch.float32, device=k.device)
    counts = torch.empty(batch, key_blocks, dtype=torch.int32, device=k.device)
    if means.numel() == 0:
        return means, counts.zero_()
    view = (k if x is None else x for x in (start, lengths, key_mask))
    key_block_means_kernel[(key_blocks * batch * kv_heads,)](
        k, means, counts, *view, blocks, *k.stride(), 0 if key_mask is None else key_mask.stride(0), kv_heads, k_len, key_blocks,
        0 if blocks is None else blocks.stride(0), block, max(1, rows // block),
        D=dim, BLOCK_D=triton.next_power_of_2(dim), KEYS=KEYS,
        START=start is not None, LENGTH=lengths is not None, MASK=key_mask is not None,
    )  # fmt: skip
    return means, counts
