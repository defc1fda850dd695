"""Means of key blocks in plain PyTorch. The contract is docs/operators.md, `key_block_means`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tsa_compile.kernels.common.row_blocks import KEYS, key_block_count, keys_of_blocks, valid_keys, valid_range
from tsa_compile.kernels.common.view import length_of, rows_in_order
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor


def key_block_means_reference(
    k: Tensor, start: Tensor | None, lengths: Tensor | None, key_mask: Tensor | None, blocks: Tensor | None = None,
    block: int = 1, k_len: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(means of every 64 keys `[B, Hk, key blocks, D]`, how many keys each is of, int32 `[B, key blocks]`).

    Means are float32, or float64 for float64 keys. Padding does not count; a block without keys has mean zero.
    """
    view = KvView(blocks, block, start, lengths)
    k = rows_in_order(k, view)[:, :, : length_of(k, view, k_len)]
    batch, _, k_len, _ = k.shape
    valid = valid_keys(k_len, *valid_range(batch, k_len, start, lengths, k.device), key_mask)
    number = keys_of_blocks(valid)
    exact = k.to(torch.float64 if k.dtype == torch.float64 else torch.float32)
    kept = F.pad(torch.where(valid[:, None, :, None], exact, 0), (0, 0, 0, key_block_count(k_len) * KEYS - k_len))
    return kept.unflatten(2, (-1, KEYS)).sum(3) / number[:, None, :, None].clamp(min=1), number.int()
