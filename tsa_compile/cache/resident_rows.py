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
from tsa_compile.cache.resident import ResidentRule, ResidentSet
from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.common.pages import PAGE, empty_index
from tsa_compile.kernels.types import Attended

AT_ONCE = 128  # pages of a batch row that come from the host to be read and forgotten
Moves = Sequence[tuple[int, int, int]]  # batch row, page, slot


class ResidentMethods:
    """What a layer of transformers that keeps all rows does otherwise where they lie in host memory.

    Attributes:
        total: rows of the sequence; `length` are those of the pool.
        host: whole pages; None before the first row.
        sums: `[B, Hk, capacity, D]`, on the device, the sums of the pages' real keys; counts int32 `[B, 1, capacity]`.
    """

    host: HostPages | None

    def __init__(self, resident: ResidentSet, **kwargs: Any) -> None:
        self.resident = resident
        self.total = 0
        self.host = None
        super().__init__(**kwargs)

    @property
    def keeping(self) -> ResidentRule:
        return self.resident.rule

    def count(self) -> int:
        return self.total + (0 if self._late is None else self._late[0].shape[-2])

    def clear(self) -> None:
        super().clear()
        self.total, self.host = 0, None
        self.resident.reset()

    def settle(self) -> None:
        """Also: a page that is full goes to the host. Rows that find no memory there wait on."""
        late = self._late
        try:
            super().settle()
        except RuntimeError:
            self._late = late
            raise
        if self.host is not None and self.host.pages < self.total // PAGE:
            self._to_host(self.host.pages, *self._open_rows(PAGE))

    def append(self, keys: torch.Tensor, values: torch.Tensor, at: torch.Tensor | None = None) -> Pair:
        """Write new rows through to the host; returns the rows of the whole sequence."""
        if at is not None or self.lengths is not None:
            self._refuse("batch rows of different lengths")
        self.settle()
        if self.host is None:
            self.host = HostPages(keys, values)
            self.sums, self.counts = empty_index(keys[:, :, :0])
        self._fit(keys, values, PAGE)
        seen = (keys, values) if self.total == 0 else self._joined(keys, values)
        inside = self.total % PAGE
        rows = [torch.cat([old, new.to(old.dtype)], 2) for old, new in zip(self._open_rows(inside), (keys, values), strict=True)]
        whole = rows[0].shape[2] // PAGE * PAGE
        if whole:
            self._to_host(self.total // PAGE, *(x[:, :, :whole] for x in rows))
        for pool, new in zip(self.buffers[:2], rows, strict=True):
            pool[:, :, : new.shape[2] - whole] = new[:, :, whole:]
        self.total += keys.shape[2]
        self.resident.reset()
        return seen

    def update_traced(self, keys: torch.Tensor, values: torch.Tensor) -> Pair:
        """As `append`, in a traced graph: the rows wait for the end of the call."""
        if self._late is not None:
            keys, values = (torch.cat([past, new], -2) for past, new in zip(self._late, (keys, values), strict=True))
        self._late = (keys, values)
        return (keys, values) if self.total == 0 else self._joined(keys, values)

    def remove_last(self, rows: int) -> None:
        self.settle()
        self.total = max(0, self.total - rows)
        page, inside = divmod(self.total, PAGE)
        if self.host is not None and page < self.host.pages:
            for pool, old in zip(self.buffers[:2], (self.host.keys, self.host.values), strict=True):
                pool[:, :, :inside] = old[:, page, :, :inside].to(pool.device)
            self.host.pages = page
        self.resident.reset()

    def select_batch(self, index: torch.Tensor) -> None:
        """Batch row `i` becomes what row `index[i]` was; the set is chosen anew."""
        self.settle()
        assert self.host is not None
        index = index.to(self.sums.device)
        open_rows = [x.index_select(0, index) for x in self._open_rows(PAGE)]
        self.host.select_batch(index)
        self.sums, self.counts = (x.index_select(0, index) for x in (self.sums, self.counts))
        if self.key_mask is not None:
            self.key_mask = self.key_mask.index_select(0, index)
        self.length = 0
        self._fit(*open_rows, PAGE)
        for pool, rows in zip(self.buffers[:2], open_rows, strict=True):
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

    def make_room(self, slots: int) -> int:
        """A pool of at least so many slots, with what is in the present ones; returns how many it has."""
        if self.length < slots * PAGE:
            self._fit(*self.buffers[:2], slots * PAGE)
        return self.length // PAGE

    def load(self, moves: Moves) -> int:
        """Copy pages from the host into slots; returns the bytes."""
        if not moves:
            return 0
        rows, pages, slots = torch.tensor(moves).unbind(1)
        taken = self.host.take(rows, pages)
        for pool, new in zip(self._slots(), taken, strict=True):
            pool[rows.to(pool.device), :, slots.to(pool.device)] = new.to(pool.device, non_blocking=True)
        return sum(x.nbytes for x in taken)

    def keep_open_page(self, moves: Moves) -> None:
        """Copy slot 0 into other slots."""
        rows, _, slots = torch.tensor(moves).unbind(1)
        for pool in self._slots():
            pool[rows.to(pool.device), :, slots.to(pool.device)] = pool[rows.to(pool.device), :, 0]

    def page_shares(self, q: torch.Tensor, scale: float) -> torch.Tensor:
        """float64 `[B, pages]`, on the CPU: each whole page's share of the attention of `q`, by mean keys, over all heads."""
        pages = self.host.pages
        sums, counts = self.sums[:, :, :pages], self.counts[..., :pages].contiguous()
        logits, _ = torch.ops.tsa.page_scores(q, sums, counts, None, 1, None, None, pages * PAGE, scale)
        return torch.softmax(logits.double(), -1).nan_to_num(0.0).mean((1, 2)).cpu()

    def with_rest(self, q: torch.Tensor, scale: float, part: Attended, slots: Sequence[dict[int, int]]) -> Attended:
        """`part`, and the attention to the pages that are in no slot, which come from the host."""
        missing = [sorted(set(range(self.host.pages)) - set(places)) for places in slots]
        most, dtype = max(map(len, missing)), part.out.dtype
        part = Attended(part.out if dtype == torch.float64 else part.out.float(), part.lse)
        for first in range(0, most, AT_ONCE):
            lists = [pages[first : first + AT_ONCE] for pages in missing]
            width = max(map(len, lists))
            pages = torch.tensor([x + [0] * (width - len(x)) for x in lists])
            wanted = torch.arange(width) < torch.tensor([len(x) for x in lists])[:, None]
            rows = torch.arange(len(lists))[:, None].expand_as(pages)
            taken = self.host.take(rows, pages)
            self.resident.counts.to_device += sum(x.nbytes for x in taken)
            real = (self.host.real[rows, pages] & wanted[..., None]).flatten(1).to(q.device)
            keys, values = (x.to(q.device, non_blocking=True).transpose(1, 2).flatten(2, 3) for x in taken)
            more = torch.ops.tsa.decode_attention(q, keys, values, None, 1, None, None, real, scale, causal=False)[:2]
            part = Attended(*torch.ops.tsa.merge(*part, more[0].to(part.out.dtype), more[1]))
        return Attended(part.out.to(dtype), part.lse)

    def as_plain(self) -> Any:
        """A layer of transformers with every row."""
        layer = self.plain()
        if self.host is not None:
            none = [x[:, :, :0] for x in self.buffers[:2]]
            rows = self._joined(*none)
            layer.lazy_initialization(*rows)
            layer.keys, layer.values = rows
        return layer

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        self._refuse("copies")

    def _assign(self, which: str, tensor: torch.Tensor | None) -> None:
        if tensor is not None:
            self._refuse("assigned keys or values")
        super()._assign(which, tensor)

    def _slots(self) -> list[torch.Tensor]:
        """The pools by slot: `[B, Hk, slots, 16, D]`."""
        return [x.unflatten(2, (-1, PAGE)) for x in self.buffers[:2]]

    def _open_rows(self, rows: int) -> list[torch.Tensor]:
        return [x[:, :, :rows] for x in self.buffers[:2]]

    def _fit(self, keys: torch.Tensor, values: torch.Tensor, rows: int) -> None:
        """A pool of at least so many rows; new slots are zero."""
        held = self.length
        buffers = self.reserve(keys, values, max(rows, held))
        self.length = buffers.keys.shape[2]
        for pool in buffers[:2]:
            pool[:, :, held:] = 0

    def _to_host(self, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Rows of whole pages, from page `first` on, `[B, Hk, n, D]`, and their entries of the index."""
        pages = [x.unflatten(2, (-1, PAGE)) for x in (keys, values)]
        number = pages[0].shape[2]
        real = torch.ones(keys.shape[0], number, PAGE, dtype=torch.bool, device=keys.device)
        mask = self.lease.key_mask
        if mask is not None:
            known = mask[:, first * PAGE : (first + number) * PAGE].to(keys.device)
            real.flatten(1)[:, : known.shape[1]] &= known
        self.resident.counts.to_host += self.host.write(first, *(x.transpose(1, 2) for x in pages), real)
        kept = torch.where(real[:, None, ..., None], pages[0], 0).to(torch.promote_types(keys.dtype, torch.float32))
        self.sums = torch.cat([self.sums[:, :, :first], kept.sum(3).to(self.sums.dtype)], 2)
        self.counts = torch.cat([self.counts[..., :first], real.sum(-1, dtype=torch.int32)[:, None]], 2)

    def _joined(self, keys: torch.Tensor, values: torch.Tensor) -> Pair:
        """The rows so far and these behind them."""
        pages, full = self.host.pages, []
        for host, pool, new in zip((self.host.keys, self.host.values), self.buffers[:2], (keys, values), strict=True):
            past = host[:, :pages].to(pool.device).transpose(1, 2).flatten(2, 3)
            full.append(torch.cat([past, pool[:, :, : self.total - pages * PAGE], new], 2))
        return full[0], full[1]

    def _refuse(self, what: str) -> NoReturn:
        raise NotImplementedError(f"a cache whose rows lie in host memory takes no {what}")
