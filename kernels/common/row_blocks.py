"""How prefill is cut into blocks: 128 query rows, 64 keys, 64 bits of a bitmap's word. Positions are those of the key tensor.

Blocks lie on positions that are multiples of their size, so a prompt given in chunks of whole row blocks is cut as it is in one
piece. Query row `i` is at position `Lk - Lq + i`; row block 0 is the one that holds row 0, so it may begin before it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

Tensor = torch.Tensor
ROWS = 128  # query rows of a row block
KEYS = 64  # keys of a key block
WORD = 64  # key blocks of one int64 of a bitmap
FLAGS = 4  # int32 before those of the rows of the batch, in what the choice of key blocks tells the attention that follows


def finest_pool(head_dim: int) -> int:
    """The fewest queries of a pooled score row with which a row block's score rows fit every GPU's shared memory."""
    return 1 if head_dim <= 64 else 2 if head_dim <= 128 else 8


def row_block_count(q_len: int, k_len: int) -> int:
    """Row blocks that hold the last `q_len` of `k_len` positions."""
    return -(-k_len // ROWS) - (k_len - q_len) // ROWS


def key_block_count(k_len: int) -> int:
    """Key blocks of `k_len` keys; the last may be partial."""
    return -(-k_len // KEYS)


def word_count(k_len: int) -> int:
    """int64 words of a bitmap with a bit for each key block."""
    return -(-key_block_count(k_len) // WORD)


def sparse_rows(length: int, last_dense: int) -> int:
    """Rows of a prompt of `length` tokens before the row blocks that `last_dense` makes dense."""
    return length if last_dense == 0 else max(length - last_dense, 0) // ROWS * ROWS


def valid_range(
    batch: int, k_len: int, start: Tensor | None, lengths: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The first position that is a key and the one behind the last, int64 `[B]` each (`KvView.start`, `KvView.lengths`)."""
    first = torch.zeros(batch, dtype=torch.long, device=device) if start is None else start.long().clamp(0, k_len)
    end = torch.full_like(first, k_len) if lengths is None else (first + lengths.long()).clamp(max=k_len)
    return first, torch.maximum(end, first)


def valid_keys(k_len: int, first: Tensor, end: Tensor, key_mask: Tensor | None) -> Tensor:
    """Which positions hold a key: bool `[B, Lk]`."""
    position = torch.arange(k_len, device=first.device)
    valid = (position >= first[:, None]) & (position < end[:, None])
    return valid if key_mask is None else valid & key_mask


def keys_of_blocks(valid: Tensor) -> Tensor:
    """How many keys each key block holds: bool `[B, Lk]` -> int64 `[B, key blocks]`."""
    return F.pad(valid, (0, -valid.shape[1] % KEYS)).unflatten(1, (-1, KEYS)).sum(2)


def own_keys(q_len: int, k_len: int, end: Tensor) -> tuple[Tensor, Tensor]:
    """The position of the first row of each row block `[R]`, and of the first of its own keys `[B, R]`.

    Own keys are the ROWS keys from there on, always read: the row block's own positions, or for rows behind the last key (right
    padding) the last ROWS positions, on a multiple of ROWS, that hold a key.
    """
    begin = ((k_len - q_len) // ROWS + torch.arange(row_block_count(q_len, k_len), device=end.device)) * ROWS
    last = ((end - 1).clamp(min=0) // ROWS * ROWS)[:, None]
    return begin, torch.minimum(begin, last)
