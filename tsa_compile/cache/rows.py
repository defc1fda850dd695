"""The rows of one attention layer: append, crop, select, and the states that follow. Knows nothing of transformers."""

from __future__ import annotations

import torch

from tsa_compile.cache.buffered import Buffered, Pair


class Rows(Buffered):
    """Appends to, and removes from, the rows of a layer."""

    def row_lengths(self) -> torch.Tensor:
        """int32 `[B]`: rows of each batch row. Does not wait for the device."""
        keys = self.settled().keys
        if self.lengths is not None:
            return self.lengths
        return torch.full((keys.shape[0],), self.length, dtype=torch.int32, device=keys.device)

    def state(self, name: str) -> dict[str, torch.Tensor] | None:
        """A state's tensors, rebuilt if someone wrote the buffers behind our back. None: dropped, or never made."""
        if self._is_stale():
            self._rebuild()
        self.settled()
        return self.states.recall(name)

    def append(self, keys: torch.Tensor, values: torch.Tensor, at: torch.Tensor | None = None) -> Pair:
        """Write `n` new rows behind the others; returns the views of all rows.

        Args:
            keys: `[B, Hk, n, D]`.
            values: `[B, Hk, n, Dv]`.
            at: int `[B]`, the row at which each batch row's new rows begin, at most `length`; None: at its end. Rows between
                a batch row's own end and the longest one's are zero or of the past: whoever reads masks them.
        """
        self.settle()
        begin, at, stale = self.length, self.lengths if at is None else at, self._is_stale()
        end = begin + keys.shape[-2]
        self.key_mask = self._padding() if begin == 0 or self.lease.key_mask is not None else self.key_mask
        buffers = self.reserve(keys, values, end)
        if begin == 0:
            self.states.begin()
        for buffer, rows in ((buffers.keys, keys), (buffers.values, values)):
            if at is None:
                buffer[:, :, begin:end] = rows
            else:
                buffer[:, :, begin:end] = 0
                write_at(buffer, rows, at)
        self.length = end
        if at is not None:
            self.lengths = (at + keys.shape[-2]).to(torch.int32)
        if stale:
            self._rebuild()
        elif self.states.kinds:
            ends, new = self.row_lengths(), keys.shape[-2]
            self.states.append(buffers.keys, buffers.values, ends - new, ends, self.key_mask, new, self._positions(new))
            self.states.settle(buffers.keys, buffers.values)
        return self.views()

    def remember(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a remembered state, which the caller fills now."""
        self.settled()
        self.states.remember(name, self.length)
        return self.states.tensors[name]

    def set_lengths(self, lengths: torch.Tensor, longest: int) -> None:
        """Each batch row keeps its first `lengths` rows (int `[B]`), none of them more than `longest`."""
        self.settle()
        if not 0 <= longest <= self.length:
            raise ValueError(f"longest: {longest} is not within the {self.length} rows of the cache")
        device = lengths.device if self.buffers is None else self.buffers.keys.device
        self.length, self.lengths = longest, lengths.to(device, torch.int32)
        self.states.crop(longest)

    def remove_last(self, rows: int) -> None:
        """Remove the last `rows` rows of every batch row; all, where there are fewer."""
        self.settle()
        self.length = max(0, self.length - rows)
        if self.lengths is not None:
            self.lengths = (self.lengths - rows).clamp_min(0)
        self.states.crop(self.length)

    def select_batch(self, index: torch.Tensor) -> None:
        """Batch row `i` becomes what row `index[i]` was; the batch becomes as large as `index`."""
        if self.count() == 0:
            return
        old = self.settled()
        index, stale = index.to(old.keys.device), self._is_stale()
        if self.lengths is not None:
            self.lengths = self.lengths.index_select(0, index)
        if self.key_mask is not None:
            self.key_mask = self.key_mask.index_select(0, index)
        chosen = {name: {f: t.index_select(0, index) for f, t in fields.items()} for name, fields in old.states.items()}
        keys, values = (x[:, :, self.first : self.first + self.length].index_select(0, index) for x in (old.keys, old.values))
        self._place(keys, values)
        if stale:
            self._rebuild()
        else:
            self.states.copy_from(chosen)
            self.states.settle(*self.settled()[:2])

    def _padding(self) -> torch.Tensor | None:
        """The running call's mask of the layer's rows."""
        return self.lease.key_mask

    def _positions(self, new: int) -> torch.Tensor | None:
        """Of the running call's `new` rows, the last ones, for states that ask for it; None: unknown."""
        known = self.lease.positions
        if not self.states.placed or (known is None and not self.lease.numbered):
            return None
        if known is None:
            return torch.arange(self.length - new, self.length, device=self.settled().keys.device)[None]
        return known if known.shape[1] == new else None

    def _rebuild(self) -> None:
        """Derived state from the rows as they are; remembered state is dropped."""
        if self.states.kinds:
            keys, values, _ = self.settled()
            ends = self.row_lengths()
            self.states.forget()
            self.states.begin()
            self.states.append(keys, values, torch.zeros_like(ends), ends, self.key_mask, self.length)
            self.states.settle(keys, values)
            self.states.rebuilt += 1


def write_at(buffer: torch.Tensor, rows: torch.Tensor, at: torch.Tensor) -> None:
    """Write `rows` `[B, Hk, n, D]` into `buffer` `[B, Hk, capacity, D]`, those of batch row `b` from `at[b]` on."""
    batch = torch.arange(len(at), device=at.device)[:, None]
    place = at.long()[:, None] + torch.arange(rows.shape[2], device=at.device)
    buffer[batch, :, place] = rows.transpose(1, 2).to(buffer.dtype)
