"""Rows of one attention layer of which whole pages lie in host memory, and some of them in a pool on the device as well.

The layer's buffers are the pool: slots of 16 rows, of which slot 0 is the open page. A decode step sees the pool, by a mask of
what lies in it; a call with many rows sees every key, those of the past for as long as the layer attends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from tsa_compile.cache.buffered import Pair
from tsa_compile.cache.host_pages import HostPages
from tsa_compile.cache.part_methods import PartMethods
from tsa_compile.cache.resident import ResidentSet
from tsa_compile.cache.resident_pages import ResidentPages
from tsa_compile.cache.resident_rule import ResidentRule
from tsa_compile.kernels.common.pages import PAGE, empty_index


class ResidentMethods(ResidentPages, PartMethods):
    """What a layer of transformers that keeps all rows does otherwise where they lie in host memory."""

    where = "lie in host memory"

    def __init__(self, resident: ResidentSet, **kwargs: Any) -> None:
        self.resident = resident
        self.stored = None
        super().__init__(**kwargs)

    @property
    def keeping(self) -> ResidentRule:
        return self.resident.rule

    def clear(self) -> None:
        super().clear()
        self.stored = None
        self.resident.reset()

    def settle(self) -> None:
        """Also: a page that is full goes to the host. Rows that find no memory there wait on."""
        late = self._late
        try:
            super().settle()
        except RuntimeError:
            self._late = late
            raise
        if self.stored is not None and self.host.pages < self.total // PAGE:
            self._to_host(self.host.pages, *self._open_rows(PAGE))

    def _store(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write new rows through to the host."""
        self._begin(keys, values)
        inside = self.total % PAGE
        rows = [torch.cat([old, new.to(old.dtype)], 2) for old, new in zip(self._open_rows(inside), (keys, values), strict=True)]
        whole = rows[0].shape[2] // PAGE * PAGE
        if whole:
            self._to_host(self.total // PAGE, rows[0][:, :, :whole], rows[1][:, :, :whole])
        for pool, new in zip(self.buffers[:2], rows, strict=True):
            pool[:, :, : new.shape[2] - whole] = new[:, :, whole:]
        self.total += keys.shape[2]
        self.resident.reset()

    def _begin(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if self.stored is None:
            self.stored = HostPages(keys, values)
            self.sums, self.counts = empty_index(keys[:, :, :0])
        self._fit(keys, values, PAGE)

    def remove_last(self, rows: int) -> None:
        self.settle()
        self.total = max(0, self.total - rows)
        page, inside = divmod(self.total, PAGE)
        if self.stored is not None and page < self.host.pages:
            for pool, old in zip(self.buffers[:2], self.host.page(page), strict=True):
                pool[:, :, :inside] = old[:, :, :inside].to(pool.device)
            self.host.crop(page)
        self.resident.reset()

    def select_batch(self, index: torch.Tensor) -> None:
        """Batch row `i` becomes what row `index[i]` was; the set is chosen anew."""
        self.settle()
        index = index.to(self.sums.device)
        keys, values = (x.index_select(0, index) for x in self._open_rows(PAGE))
        self.host.select_batch(index)
        self.sums, self.counts = (x.index_select(0, index) for x in (self.sums, self.counts))
        if self.key_mask is not None:
            self.key_mask = self.key_mask.index_select(0, index)
        self.length = 0
        self._fit(keys, values, PAGE)
        for pool, rows in zip(self.buffers[:2], (keys, values), strict=True):
            pool[:, :, :PAGE] = rows
        self.resident.reset()

    def advance(self, rows: int) -> None:
        self.total += rows

    def has_room(self, rows: int) -> bool:
        return True  # in slot 0

    def first_new_row(self) -> tuple[int, None]:
        return self.total % PAGE, None

    def rows_before(self) -> int:
        return self.length  # the mask alone says what is seen: pages lie in any slot

    def own_mask(self, mask: torch.Tensor | None, new: int) -> torch.Tensor:
        """What a step sees of the pool."""
        keys = self.buffers.keys
        if mask is None:
            mask = torch.ones(keys.shape[0], self.total + new, dtype=torch.int64, device=keys.device)
        page, mask = self.total // PAGE, mask[:, : self.total + new]
        by_page = torch.nn.functional.pad(mask, (0, (page + 1) * PAGE - mask.shape[1])).unflatten(1, (-1, PAGE))
        table = self.resident.table(keys.shape[0], self.length // PAGE, mask.device)
        seen = by_page.gather(1, table.clamp_min(0)[..., None].expand(-1, -1, PAGE)).masked_fill(table[..., None] < 0, 0)
        seen[:, 0] = by_page[:, page]
        return seen.flatten(1)

    def around_step(self, layers: Sequence[Any]) -> contextlib.AbstractContextManager[bool]:
        return self.resident.around_step(layers)

    def position(self) -> torch.Tensor:
        """int64 `[B or 1, 1]`: where the row of the running step stands."""
        told = self.lease.positions
        return torch.full((1, 1), self.count(), device=self.buffers.keys.device) if told is None else told[:, -1:].clone()

    def make_room(self, slots: int) -> int:
        """A pool of at least so many slots, with what is in the present ones; returns how many it has."""
        if self.length < slots * PAGE:
            self._fit(self.buffers.keys, self.buffers.values, slots * PAGE)
        return self.length // PAGE

    def as_plain(self) -> Any:
        """A layer of transformers with every row."""
        layer = self.plain()
        if self.stored is not None:
            none = [x[:, :, :0] for x in self.buffers[:2]]
            rows = self._joined(*none)
            layer.lazy_initialization(*rows)
            layer.keys, layer.values = rows
        return layer

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        self._refuse("copies")

    def _fit(self, keys: torch.Tensor, values: torch.Tensor, rows: int) -> None:
        """A pool of at least so many rows; new slots are zero."""
        held = self.length
        buffers = self.reserve(keys, values, max(rows, held))
        self.length = buffers.keys.shape[2]
        for pool in buffers[:2]:
            pool[:, :, held:] = 0

    def _joined(self, keys: torch.Tensor, values: torch.Tensor) -> Pair:
        if self.total == 0:
            return keys, values
        past, opened = self.host.whole(keys.device), self._open_rows(self.total - self.host.pages * PAGE)
        full = [torch.cat(parts, 2) for parts in zip(past, opened, (keys, values), strict=True)]
        return full[0], full[1]
