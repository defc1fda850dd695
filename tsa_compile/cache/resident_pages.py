"""The pages of one attention layer: in host memory, in slots of the pool on the device, and in an index of mean keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tsa_compile.cache.host_pages import HostPages
from tsa_compile.cache.lookahead_index import LookaheadIndex
from tsa_compile.cache.resident import Asked, ResidentSet
from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.common.pages import PAGE
from tsa_compile.kernels.types import Attended

AT_ONCE = 128  # pages of a batch row that come from the host to be read and forgotten
Moves = Sequence[tuple[int, int, int]]  # batch row, page, slot


class ResidentPages:
    """Moves pages, and reads them where they lie.

    Attributes:
        resident: which pages are in which slots, for all layers of the cache.
        stored: `host`; None before the first row.
        sums: `[B, Hk, pages, D]`, on the device, the sums of the pages' real keys; counts int32 `[B, 1, pages]`.
    """

    resident: ResidentSet
    stored: HostPages | None
    sums: torch.Tensor
    counts: torch.Tensor
    buffers: Any
    lease: Any

    @property
    def host(self) -> HostPages:
        """The whole pages, in host memory."""
        if self.stored is None:
            raise ValueError("the cache layer is empty: nothing was appended yet")
        return self.stored

    def load(self, moves: Moves) -> int:
        """Copy pages from the host into slots; returns the bytes."""
        return self._copy(self.buffers.keys, self.buffers.values, moves)

    def keep_open_page(self, moves: Moves) -> None:
        """Copy slot 0 into other slots."""
        rows, _, slots = torch.tensor(moves).unbind(1)
        for pool in self._slots():
            pool[rows.to(pool.device), :, slots.to(pool.device)] = pool[rows.to(pool.device), :, 0]

    def page_scores(self, asked: Asked, index: LookaheadIndex | None) -> torch.Tensor:
        """float64 `[B, pages]`, on the CPU: how much each whole page is needed. By a learned index, or else each page's share of
        the attention of the queries, by mean keys, over all heads."""
        pages = self.host.pages
        sums, counts = self.sums[:, :, :pages], self.counts[..., :pages].contiguous()
        if index is not None:
            means = sums / counts.clamp_min(1)[..., None].to(sums.dtype)
            return index.logits(asked.q, asked.positions, means)[:, 0].double().sigmoid().cpu()
        logits, _ = torch.ops.tsa.page_scores(asked.q, sums, counts, None, 1, None, None, pages * PAGE, asked.scale)
        return torch.softmax(logits.double(), -1).nan_to_num(0.0).mean((1, 2)).cpu()

    def with_rest(self, q: torch.Tensor, scale: float, part: Attended, slots: Sequence[dict[int, int]]) -> Attended:
        """`part`, and the attention to the pages that are in no slot, which come from the host."""
        missing = [sorted(set(range(self.host.pages)) - set(places)) for places in slots]
        most, dtype = max(map(len, missing)), part.out.dtype
        part = Attended(part.out if dtype == torch.float64 else part.out.float(), part.lse)
        for first in range(0, most, AT_ONCE):
            lists = [pages[first : first + AT_ONCE] for pages in missing]
            width = max(map(len, lists))
            keys, values = (q.new_zeros(*x.shape[:2], width * PAGE, x.shape[3]) for x in self.buffers[:2])
            moves = [(b, page, slot) for b, pages in enumerate(lists) for slot, page in enumerate(pages)]
            self.resident.counts.to_device += self._copy(keys, values, moves)
            real = torch.zeros(len(lists), width, PAGE, dtype=torch.bool)
            rows, pages, at = torch.tensor(moves).unbind(1)
            real[rows, at] = self.host.real[rows, pages]
            real = real.flatten(1).to(q.device)
            more = torch.ops.tsa.decode_attention(q, keys, values, None, 1, None, None, real, scale, causal=False)[:2]
            part = Attended(*torch.ops.tsa.merge(*part, more[0].to(part.out.dtype), more[1]))
        return Attended(part.out.to(dtype), part.lse)

    def _to_host(self, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Rows of whole pages, from page `first` on, `[B, Hk, n, D]`, and their entries of the index."""
        pages = [x.unflatten(2, (-1, PAGE)) for x in (keys, values)]
        number = pages[0].shape[2]
        real = torch.ones(keys.shape[0], number, PAGE, dtype=torch.bool, device=keys.device)
        mask = self.lease.key_mask
        if mask is not None:
            known = mask[:, first * PAGE : (first + number) * PAGE].to(keys.device)
            real.flatten(1)[:, : known.shape[1]] &= known
        self.resident.counts.to_host += self.host.write(first, pages[0].transpose(1, 2), pages[1].transpose(1, 2), real)
        kept = torch.where(real[:, None, ..., None], pages[0], 0).to(torch.promote_types(keys.dtype, torch.float32))
        self.sums = torch.cat([self.sums[:, :, :first], kept.sum(3).to(self.sums.dtype)], 2)
        self.counts = torch.cat([self.counts[..., :first], real.sum(-1, dtype=torch.int32)[:, None]], 2)

    def _copy(self, keys: torch.Tensor, values: torch.Tensor, moves: Moves) -> int:
        """Pages of the host into slots of `keys` and `values` `[B, Hk, slots * 16, D]`; returns the bytes."""
        for segment, own in self.host.by_segment(moves):
            listed = torch.tensor(own, dtype=torch.int32).to(keys.device)
            torch.ops.tsa.load_pages(keys, segment.keys, listed)
            torch.ops.tsa.load_pages(values, segment.values, listed)
        return len(moves) * self.host.page_bytes

    def _slots(self) -> list[torch.Tensor]:
        """The pools by slot: `[B, Hk, slots, 16, D]`."""
        return [x.unflatten(2, (-1, PAGE)) for x in self.buffers[:2]]

    def _open_rows(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first rows of slot 0."""
        return self.buffers.keys[:, :, :rows], self.buffers.values[:, :, :rows]
