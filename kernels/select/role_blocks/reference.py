"""The key blocks of query heads that read everything, and of those that read the first and last tokens, in plain PyTorch.

The contract is docs/operators.md, `role_key_blocks`. Nothing waits for the device, so it runs on a GPU as it is: a bitmap is a
few megabytes, and is made once for all heads that are alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tsa_compile.kernels.common.launch import constant
from tsa_compile.kernels.common.row_blocks import KEYS, ROWS, WORD, own_keys, valid_range, word_count

Tensor = torch.Tensor


def role_key_blocks(
    q: Tensor,
    k: Tensor,
    start: Tensor | None,
    lengths: Tensor | None,
    local: Sequence[bool],
    window: int,
    first_keys: int,
    k_len: int,
) -> Tensor:
    """`tsa::role_key_blocks` on any device: int64 `[B, H, row blocks, words]`."""
    first, end = valid_range(q.shape[0], k_len, start, lengths, q.device)
    begin, _ = own_keys(q.shape[2], k_len, end)
    block = torch.arange(word_count(k_len) * WORD, device=q.device)
    there = (block >= first[:, None] // KEYS) & (block * KEYS < end[:, None])  # [B, key blocks]
    there = there[:, None] & (block * KEYS < begin[:, None] + ROWS)  # [B, row blocks, key blocks]
    near = block >= (begin - window + 1).clamp(min=0)[:, None] // KEYS
    sink = block * KEYS < (first + first_keys)[:, None] if first_keys else torch.zeros_like(there[:, 0])
    every, few = (_words(kept)[:, None] for kept in (there, there & (near | sink[:, None])))
    is_local = constant(tuple(map(int, local)), torch.int64, q.device)[:, None, None] > 0
    return torch.where(is_local, few, every)


def _words(kept: Tensor) -> Tensor:
    """bool `[..., words * 64]` -> int64 `[..., words]`."""
    return (kept.unflatten(-1, (-1, WORD)).long() << torch.arange(WORD, device=kept.device)).sum(-1)
