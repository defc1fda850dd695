"""A layer as a captured step sees it: whole buffers at fixed addresses, and the place of the new rows in a tensor."""

from __future__ import annotations

import torch

from tsa_compile.cache.buffered import Pair
from tsa_compile.cache.rows import Rows, write_at


class PinnableRows(Rows):
    """Rows that can be pinned while steps of one shape are captured, compiled or replayed.

    Pinned, `append` writes at `at`, a tensor that the caller owns and moves on, and returns the whole buffers: one graph for
    all steps. It runs no Python that depends on a length; so the caller asks `has_room` before each step, and says `advance`
    after it.
    """

    pinned: torch.Tensor | None = None

    def pin(self, at: torch.Tensor) -> None:
        """Fix the buffers' addresses.

        Rows beyond the length become zero once, so that attention that masks them with weight 0 does not meet NaN there.

        Args:
            at: int32 `[B]`, on the layer's device: where each batch row's next rows go.
        """
        keys, values, _ = self.settled()
        if at.shape != keys.shape[:1] or at.dtype != torch.int32 or at.device != keys.device:
            raise ValueError(f"at: {at.dtype} {list(at.shape)} on {at.device}; allowed: int32 [{keys.shape[0]}] on {keys.device}")
        stale = self._is_stale()
        keys[:, :, self.length :] = 0
        values[:, :, self.length :] = 0
        if stale:
            self._rebuild()
        self.states.settle(keys, values)
        self.pinned = at

    def unpin(self) -> None:
        """Views of the rows again."""
        self.pinned = None

    def has_room(self, rows: int) -> bool:
        """Do `rows` more rows fit? If not: `unpin`, and let the next step grow the buffers."""
        return self.length + rows <= self.settled().keys.shape[2]

    def advance(self, rows: int) -> None:
        """A step has written `rows` rows of every batch row; they are not counted as someone else's."""
        if not self.has_room(rows):
            raise ValueError(f"rows: {rows} more than {self.length} do not fit the buffers")
        self.length += rows
        if self.lengths is not None:
            self.lengths = self.lengths + rows
        self.states.settle(*self.settled()[:2])

    def append_pinned(self, keys: torch.Tensor, values: torch.Tensor) -> Pair:
        """What a captured step does: tensor operations only."""
        assert self.pinned is not None
        assert self.buffers is not None
        write_at(self.buffers.keys, keys, self.pinned)
        write_at(self.buffers.values, values, self.pinned)
        new = keys.shape[-2]
        self.states.append(*self.buffers[:2], self.pinned, self.pinned + new, self.key_mask, new)
        return self.buffers.keys, self.buffers.values
