"""A layer as a captured step sees it: whole buffers at fixed addresses, and the place of the new rows in a tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from tsa_compile.cache.buffered import Buffers, Pair
from tsa_compile.cache.place import Place
from tsa_compile.cache.rows import Rows
from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa


class PinnableRows(Rows):
    """Rows that can be pinned while steps of one shape are captured, compiled or replayed.

    Pinned, `append` writes at `place.at`, which the caller moves on, and returns the whole buffers: one graph for all steps. It
    runs no Python that depends on a length; so the caller asks `has_room` before each step, and says `advance` after it.
    """

    pinned: Place | None = None
    _cleared: tuple[Buffers, int, int] | None = None  # the buffers, and their versions when no row behind the length was NaN

    def pin(self, place: Place) -> None:
        """Fix the buffers' addresses.

        Rows beyond the length become zero, once and whenever someone else wrote into the buffers, so that attention that masks
        them with weight 0 does not meet NaN there.
        """
        keys, values, _ = buffers = self.settled()
        if place.at.shape != keys.shape[:1] or place.at.device != keys.device:
            got, wanted = list(place.at.shape), keys.shape[0]
            raise ValueError(f"place.at: {got} on {place.at.device}; allowed: [{wanted}] on {keys.device}")
        stale = self._is_stale()
        if self._cleared is None or self._cleared[0] is not buffers or self._cleared[1:] != (keys._version, values._version):
            keys[:, :, self.length :] = 0
            values[:, :, self.length :] = 0
            if not stale:
                self.states.settle(keys, values)
        if stale:
            self._rebuild()
        if self.lease.key_mask is not None:
            self.key_mask = self._padding()
        self.pinned = place

    def first_new_row(self) -> tuple[int, torch.Tensor | None]:
        """The row of the buffers at which new ones begin; and of each batch row, int32 `[B]`, where they differ."""
        return self.length, self.lengths

    def rows_before(self) -> int:
        """What the model is told of the rows before the new ones: at least as many as the buffers' row that it sees last."""
        return self.count()

    def around_step(self, layers: Sequence[Any]) -> contextlib.AbstractContextManager[bool]:
        """What is to be done around a step of the cache's layers; yields whether the step must run anew, and not be replayed."""
        return contextlib.nullcontext(False)

    def mode(self) -> str | None:
        """Steps of different modes do different things with the same buffers, and are recorded apart."""
        return None

    def own_mask(self, mask: torch.Tensor | None, new: int) -> torch.Tensor | None:
        """What a step of `new` rows sees of the buffers, by its padding mask `[B, n]`: the same, where these hold every row."""
        return mask

    def unpin(self) -> None:
        """Views of the rows again."""
        self.pinned = None

    def has_room(self, rows: int) -> bool:
        """Do `rows` more rows fit? If not: `unpin`, and `grow`."""
        return self.length + rows <= self.settled().keys.shape[2]

    def grow(self, rows: int) -> None:
        """Buffers with room for `rows` more rows: larger ones, if need be."""
        keys, values, _ = self.settled()
        self.reserve(keys, values, self.length + rows)

    def advance(self, rows: int) -> None:
        """A step has written `rows` rows of every batch row; they are not counted as someone else's."""
        buffers = self.settled() if self.buffers is None else self.buffers
        keys, values, _ = buffers
        if self.length + rows > keys.shape[2]:
            raise ValueError(f"rows: {rows} more than {self.length} do not fit the buffers")
        self.length += rows
        if self.lengths is not None:
            self.lengths = self.lengths + rows
        self.states.settle(keys, values)
        self._cleared = (buffers, keys._version, values._version)

    def append_pinned(self, keys: torch.Tensor, values: torch.Tensor) -> Pair:
        """What a captured step does: tensor operations only."""
        assert self.pinned is not None
        assert self.buffers is not None
        place, new = self.pinned, keys.shape[-2]
        rows = place.rows if new == 1 else place.rows + torch.arange(new, device=keys.device)
        for buffer, written in ((self.buffers.keys, keys), (self.buffers.values, values)):
            buffer[place.batch, :, rows] = written.transpose(1, 2).to(buffer.dtype)
        if place.shown is not None:
            torch.ops.tsa.attach_rows.default(place.mark, place.lengths, place.shown, place.start, self.buffers.keys)
        if self.states.kinds:
            key_mask = place.key_mask if place.padded else None
            positions = place.positions[new] if self.states.placed else None
            self.states.append(*self.buffers[:2], place.at, place.at + new, key_mask, new, positions)
        return self.buffers.keys, self.buffers.values
