"""The last rows of a sliding-window layer: a view that moves through a buffer of twice the window."""

from __future__ import annotations

from typing import Any

import torch

from tsa_compile.cache.buffered import Buffered, Pair
from tsa_compile.cache.kv_state import PAGE
from tsa_compile.cache.storage import Storage


class SlidingRows(Buffered):
    """Keeps the last `sliding_window - 1` rows; what a query of the window's next row reads.

    New rows go behind the others; when the buffer is full, the window is copied to its front: once in as many rows as it has.

    Attributes (transformers sets them):
        sliding_window: rows that a query sees, its own included.
        cumulative_length: rows seen so far.
        record_past: keep all rows until `crop`, so that it can take them back.
    """

    sliding_window: int
    cumulative_length: int
    record_past: bool

    def _capacity(self, storage: Storage, rows: int) -> int:
        held = 0 if self.buffers is None else self.buffers.keys.shape[2]
        return max(held, -(-max(2 * self.sliding_window, rows) // PAGE) * PAGE)

    def append(self, keys: torch.Tensor, values: torch.Tensor, at: torch.Tensor | None = None) -> Pair:
        """Write new rows; returns the rows that these queries see: the window before them, and themselves."""
        if at is not None:
            raise ValueError("at: batch rows of a sliding-window layer have one length")
        self.settle()
        new, past = keys.shape[-2], self.length
        self.cumulative_length += new
        seen = min(past, self.sliding_window - 1) + new
        if self.record_past or past + new <= 2 * self.sliding_window:
            full = self._written(keys, values)
        else:  # a long prompt: its queries see it all, the buffer keeps its end
            full = tuple(torch.cat([old, rows], -2) for old, rows in zip(self._views(keys, values), (keys, values), strict=True))
            self._place(*(t[:, :, t.shape[2] - self.sliding_window + 1 :] for t in full))
        if not self.record_past:
            self.keep_last(self.sliding_window - 1)
        return full[0][:, :, full[0].shape[2] - seen :], full[1][:, :, full[1].shape[2] - seen :]

    def keep_last(self, rows: int) -> None:
        """Rows before the last `rows` leave the view."""
        self.settle()
        leaving = max(0, self.length - rows)
        self.first, self.length = self.first + leaving, self.length - leaving

    def remove_last(self, rows: int) -> None:
        self.settle()
        self.length = max(0, self.length - rows)

    def select_batch(self, index: torch.Tensor) -> None:
        """Batch row `i` becomes what row `index[i]` was."""
        keys, values = self._views()
        index = index.to(keys.device)
        self._place(keys.index_select(0, index), values.index_select(0, index))

    def _views(self, *like: torch.Tensor) -> Pair:
        """The present rows; `like` says what none look like."""
        self.settle()
        keys, values = like if self.buffers is None else self.buffers[:2]
        rows = slice(self.first, self.first + self.length)
        return keys[:, :, rows], values[:, :, rows]

    def _written(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[Any, ...]:
        """Write the rows behind the present ones, and return the views of all."""
        rows = self.length + keys.shape[-2]
        if self.first + rows > self.reserve(keys, values, rows).keys.shape[2]:
            self._place(*(t.clone() for t in self._views()))
        end = self.first + rows
        for buffer, new in zip(self.reserve(keys, values, rows)[:2], (keys, values), strict=True):
            buffer[:, :, end - new.shape[2] : end] = new
        self.length = rows
        return self._views()
