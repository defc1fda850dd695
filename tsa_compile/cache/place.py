"""Where a step on fixed buffers writes, and which rows it sees: tensors at fixed addresses, moved on outside of the graph."""

from __future__ import annotations

import torch


class Place:
    """One for each storage and device.

    Attributes:
        at: int32 `[B]`, the row at which each batch row's new rows begin.
        rows: int64 `[B, 1]`, the same; with `batch`, int64 `[B, 1]`, the batch rows, it indexes the buffers.
        offset: int64, no dimension: the rows before the new ones; where batch rows differ, of the longest.
        mask: `[B, capacity]`, 1: a row that is no padding; 0 behind the new rows. In the dtype of the call's own mask.
        key_mask: bool, the same, for the states of the layers.
        padded: did the call bring a mask?
        shown: bool `[B, 1, new, capacity]`, what each new row sees, where the call is told what is padding (`show`); or None.
            Then `lengths`, int32 `[B]`, are the rows behind the padding, the new ones included, and `start`, int32 `[B]`, is
            where they begin; None: at the first.
        positions: int64 `[B, new]` by the number of new rows, where these stand; for states of the layers that ask for it.
    """

    def __init__(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> None:
        with torch.inference_mode(False):
            self.at = torch.zeros(batch, dtype=torch.int32, device=device)
            self.rows = torch.zeros(batch, 1, dtype=torch.int64, device=device)
            self.batch = torch.arange(batch, device=device)[:, None]
            self.offset = torch.zeros((), dtype=torch.int64, device=device)
            self.mask = torch.zeros(batch, capacity, dtype=dtype, device=device)
            self.key_mask = torch.zeros(batch, capacity, dtype=torch.bool, device=device)
            self.lengths, self._start = torch.zeros_like(self.at), torch.zeros_like(self.at)
            self.mark = torch.zeros(1, dtype=torch.int8, device=device)  # of `tsa::attach_rows`
        self.visible: dict[int, torch.Tensor] = {}  # by the number of new rows
        self.positions: dict[int, torch.Tensor] = {}
        self.padded = False
        self.shown: torch.Tensor | None = None
        self.start: torch.Tensor | None = None
        self._known = 0  # columns of the mask that may not be 0

    def move(
        self, length: int, lengths: torch.Tensor | None, mask: torch.Tensor | None, before: int | None = None, steps: int = 1
    ) -> None:
        """To a step behind `length` rows; nothing waits for the device.

        Args:
            length: rows in the buffers, of the longest batch row.
            lengths: int32 `[B]`, where batch rows differ.
            mask: the call's `[B, n]` padding mask, `n` at most the capacity; None: no padding.
            before: what the model is told of the rows before the new ones; None: `length`.
            steps: how many follow before the next move, this one included; see `advance`.
        """
        self.offset.fill_(length if before is None else before)
        if lengths is None:
            self.at.fill_(length)
        else:
            self.at.copy_(lengths)
        self.rows.copy_(self.at[:, None])
        self.padded, self.shown = mask is not None, None
        if mask is None:
            return
        known = mask.shape[1]
        self.mask[:, :known] = mask
        if known < self._known:
            self.mask[:, known : self._known] = 0
        self._known = known + steps - 1
        torch.ne(self.mask, 0, out=self.key_mask)

    def show(self, new: int, padding: torch.Tensor | None) -> torch.Tensor:
        """After a move without a mask: `shown` for `new` rows. `padding`: how many first rows are, int32 `[B]`; None: none is."""
        self.padded, self.start = padding is not None, None if padding is None else self._start
        torch.add(self.at, new, out=self.lengths)
        if padding is None:
            self.key_mask.fill_(True)
        else:
            self._start.copy_(padding)
            self.lengths.sub_(self._start)
            torch.ge(torch.arange(self.key_mask.shape[1], device=self.at.device), self._start[:, None], out=self.key_mask)
        self.shown = self.visible_to(new)
        return self.shown

    def stand(self, new: int, positions: torch.Tensor | None) -> None:
        """The `new` rows stand at `positions`, int `[B or 1, new]`; None: where the model puts them, which was told `offset`."""
        if new not in self.positions:
            with torch.inference_mode(False):
                self.positions[new] = self.rows.new_empty(len(self.rows), new)
        known = self.offset + torch.arange(new, device=self.rows.device) if positions is None else positions
        self.positions[new].copy_(known)

    def advance(self) -> None:
        """To the step behind one of one row, by operations of the device alone: in a recording, too."""
        for place in (self.at, self.rows, self.offset, self.lengths, *self.positions.values()):
            place.add_(1)
        if self.shown is not None:
            self.shown.view(self.mask.shape).scatter_(1, self.rows, True)
        elif self.padded:
            self.mask.scatter_(1, self.rows, 1)
            self.key_mask.scatter_(1, self.rows, True)

    def holds(self, x: object) -> bool:
        """Is it one of the masks here, which need no copy to stay where they are?"""
        return x is self.mask or any(x is mask for mask in self.visible.values())

    def visible_to(self, new: int) -> torch.Tensor:
        """bool `[B, 1, new, capacity]`: the keys that each of `new` rows sees where batch rows differ in length, which no mask of
        keys alone can say. Made anew at each call, at a fixed address."""
        if new not in self.visible:
            with torch.inference_mode(False):
                self.visible[new] = self.key_mask.new_empty(len(self.rows), 1, new, self.key_mask.shape[1])
        column = torch.arange(self.key_mask.shape[1], device=self.rows.device)
        own = self.rows[:, :, None, None] + torch.arange(new, device=self.rows.device)[:, None]
        return torch.logical_and(self.key_mask[:, None, None], column <= own, out=self.visible[new])
