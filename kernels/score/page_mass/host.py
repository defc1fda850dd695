"""Launch of the means of key blocks (device.py). The contract is docs/operators.md, `key_block_means`."""

from __future__ import annotations

import torch

from tsa_compile.kernels.common.row_blocks import KEYS, key_block_count

Tensor = torch.Tensor


def key_block_means(k: Tensor, start: Tensor | None, lengths: Tensor | None, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(means of every 64 keys, float32 `[B, Hk, key blocks, D]`; how many keys each is of, int32 `[B, key blocks]`).

    Padding does not count. Nothing waits for the device.
    """
    import triton

    from tsa_compile.kernels.score.page_mass.device import key_block_means_kernel

    batch, kv_heads, k_len, dim = k.shape
    blocks = key_block_count(k_len)
    means = torch.empty(batch, kv_heads, blocks, dim, dtype=torch.float32, device=k.device)
    counts = torch.empty(batch, blocks, dtype=torch.int32, device=k.device)
    if means.numel() == 0:
        return means, counts.zero_()
    view = (k if x is None else x for x in (start, lengths, key_mask))
    key_block_means_kernel[(blocks, batch * kv_heads)](
        k, means, counts, *view, *k.stride(), 0 if key_mask is None else key_mask.stride(0), kv_heads, k_len, blocks,
        D=dim, BLOCK_D=triton.next_power_of_2(dim), KEYS=KEYS,
        START=start is not None, LENGTH=lengths is not None, MASK=key_mask is not None,
    )  # fmt: skip
    return means, counts
