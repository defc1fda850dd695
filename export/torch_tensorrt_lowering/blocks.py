"""How the lowered operators of block selection cut a call: 128 query rows, 64 keys (`kernels/common/row_blocks.py`).

There is one block of each kind behind the last, which holds nothing: a size that may be 1 would be asked for its value.
"""

from __future__ import annotations

import torch

from tsa_compile.export.common import ExportError
from tsa_compile.export.torch_tensorrt_lowering.rows import Size, look_up, number
from tsa_compile.kernels.common.row_blocks import KEYS, ROWS

Tensor = torch.Tensor


class Keys:
    """The positions of one call that hold keys. `[b]` below means the batch, or 1 for all its rows.

    Args:
        k: `[B, Hk, Lk, D]`.
        start, lengths: int32 `[B]`, or None. key_mask: bool `[B, Lk]`, or None: all of them.

    Attributes:
        blocks: key blocks, and one.
        first, end: int64 `[b, 1]`, the first position that holds a key and the one behind the last.
        real: bool `[B, Lk]`, which positions do; None: all.
    """

    def __init__(self, k: Tensor, start: Tensor | None, lengths: Tensor | None, key_mask: Tensor | None) -> None:
        self.batch, self.kv_heads, self.length = k.shape[:3]
        self.blocks = (self.length + KEYS - 1) // KEYS + 1
        self.column = torch.arange(self.length, device=k.device)
        length = number(self.length, k.device)
        self.first = torch.zeros_like(length) if start is None else start.long()[:, None].clamp(min=0).minimum(length)
        self.end = length if lengths is None else (self.first + lengths.long()[:, None]).minimum(length).maximum(self.first)
        self.real = key_mask
        if start is not None or lengths is not None:
            inside = (self.column >= self.first) & (self.column < self.end)
            self.real = inside if key_mask is None else inside & key_mask

    def hold(self, position: Tensor) -> Tensor:
        """Which of these positions int64 `[...]` hold a key: bool `[b, ...]`."""
        there = (position >= 0) & (position <= self.column[-1:])
        if self.real is None:
            return there[None]
        return there & (look_up(self.real.long()[:, None], self.clip(position)[None, None])[:, 0] > 0)

    def clip(self, position: Tensor) -> Tensor:
        """The nearest position in [0, Lk)."""
        return position.clamp(min=0).minimum(self.column[-1:])


class RowBlocks:
    """The row blocks of the last `q_len` positions.

    Attributes:
        number: row blocks, and one.
        offset: position of the first query.
        begin: int64 `[number]`, position of the first row. own: int64 `[b, number]`, of the first own key.
        there: bool `[number]`, false for the one behind the last.
    """

    def __init__(self, q_len: Size, keys: Keys) -> None:
        device = keys.column.device
        self.offset = keys.length - q_len
        self.before = self.offset // ROWS  # row blocks that hold no row
        self.number = (keys.length + ROWS - 1) // ROWS - self.before + 1
        self.begin = (torch.arange(self.number, device=device) + self.before) * ROWS
        self.own = self.begin.minimum((keys.end - 1).clamp(min=0) // ROWS * ROWS)
        self.there = self.begin <= keys.column[-1:]


def refuse_pool(name: str, blocks: Tensor | None, k_len: int | None) -> None:
    """Raise an ExportError if keys lie in blocks of a pool."""
    if blocks is not None or k_len is not None:
        raise ExportError(f"tsa::{name}: its keys lie in blocks of a pool; its lowering takes keys in order")
