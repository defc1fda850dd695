"""Which pages of a sequence are on the device, and when others are: one set for all layers of a cache.

Lookahead sparse attention (FlashMemory, arXiv 2606.09079): every `interval` steps the pages that the next steps will need are
predicted, from this step's queries at a few layers; they, the first and the last pages become resident, and in between nothing
is moved. What predicts is the mean key of a page, which needs no training, or a learned index (`lookahead_index.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from tsa_compile.cache.copying import copying
from tsa_compile.cache.resident_rule import ResidentCounts, ResidentRule
from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.common.pages import PAGE
from tsa_compile.kernels.common.shares import share_bits
from tsa_compile.kernels.resident import watching
from tsa_compile.kernels.select.top_pages.reference import choose
from tsa_compile.kernels.types import Attended


class Asked(NamedTuple):
    """One layer's queries `[B, H, 1, D]`, rotated, the scale of their scores, and where they stand, int `[B or 1, 1]`."""

    q: torch.Tensor
    scale: float
    positions: torch.Tensor


class ResidentSet:
    """The resident pages of each batch row, and the slot of the pools in which each lies.

    Slot `s` of a layer's pool are its rows `[16 s, 16 s + 16)`. Slot 0 is the open page, which is being written.
    Between steps the table is right: what it does not list may be anything, and no step sees it.
    """

    def __init__(self, rule: ResidentRule) -> None:
        self.rule = rule
        self.counts = ResidentCounts()
        self.reset()

    def reset(self) -> None:
        """Nothing is resident: the sequence is another one."""
        self.slots: list[dict[int, int]] = []  # of each batch row: page -> slot
        self._free: list[list[int]] = []
        self._arriving: list[tuple[Callable[[], bool], list[tuple[int, int, int]]]] = []
        self._queries: dict[int, Asked] = {}
        self._since = 0  # steps since the set was chosen
        self._size = 0  # slots that the pools have
        self._table: torch.Tensor | None = None

    @property
    def known(self) -> bool:
        """Was a set chosen for this sequence?"""
        return bool(self.slots)

    def table(self, batch: int, slots: int, device: torch.device) -> torch.Tensor:
        """int64 `[batch, slots]`: the page in each slot, -1: none. Made anew when the set has changed."""
        if self._table is None or self._table.shape != (batch, slots) or self._table.device != device:
            table = torch.full((batch, slots), -1)
            for b, places in enumerate(self.slots):
                table[b, list(places.values())] = torch.tensor(list(places), dtype=torch.int64)
            self._table = table.to(device)
        return self._table

    @contextlib.contextmanager
    def around_step(self, layers: Sequence[Any]) -> Iterator[bool]:
        """Before a step pages are moved; yields whether the step must run anew, since it is looked at from outside of graphs.

        Raises:
            RuntimeError: pages could not be copied; the cache is as it was, and the next step tries again.
        """
        self._arrive()
        first = not self.known
        if first:
            self._begin(layers)
        else:
            self._adopt(layers)
            if self._queries:
                self._refresh(layers)
        self._since += 1
        scores = first or self._since >= self.rule.interval
        sampled = self.rule.sample > 0 and self.counts.steps % self.rule.sample == 0
        reads_all = self.rule.strict or first  # the first step knows no better
        self.counts.steps += 1
        if not (scores or sampled or reads_all):
            yield False
            return
        with watching(self._watcher(layers, scores, sampled, reads_all)):
            yield True

    def _watcher(self, layers: Sequence[Any], scores: bool, sampled: bool, reads_all: bool) -> Any:
        by_address = {layer.buffers.keys.data_ptr(): n for n, layer in enumerate(layers)}
        asked = self.rule.asked(len(layers))

        def watch(q: torch.Tensor, k: torch.Tensor, scale: float, part: Attended) -> Attended:
            n = by_address.get(k.data_ptr())
            if n is None:
                raise RuntimeError("Resident: an attention reads keys that are not a pool of the cache: was its dtype changed?")
            if scores and n in asked:
                self._queries[n] = Asked(q.clone(), scale, layers[n].position())
            if not (sampled or reads_all):
                return part
            whole = layers[n].with_rest(q, scale, part, self.slots)
            if sampled:
                self.counts.sampled += 1
                self.counts.lost += float((1 - torch.exp(part.lse.double() - whole.lse.double())).nan_to_num(0.0).mean())
            return whole if reads_all else part

        return watch

    def _begin(self, layers: Sequence[Any]) -> None:
        """The first and the last pages, as many as may be; no query is known yet."""
        first = layers[0]
        latest = list(range(first.host.pages)) if self.rule.is_bounded else [0] * first.host.pages
        wanted = self._chosen(first, [latest] * first.host.batch)
        self._size, self._free = 0, [[] for _ in wanted]
        self.slots = [{} for _ in wanted]
        try:
            self._install(layers, wanted)
        except RuntimeError:
            self.reset()
            raise

    def _refresh(self, layers: Sequence[Any]) -> None:
        indexes = dict(self.rule.indexes)
        joined = torch.stack([layers[n].page_scores(asked, indexes.get(n)) for n, asked in self._queries.items()])
        joined = joined.amax(0) if self.rule.ensemble == "max" else joined.mean(0)
        self._install(layers, self._chosen(layers[0], joined.tolist()))
        self._queries, self._since = {}, 0
        self.counts.refreshes += 1

    def _chosen(self, layer: Any, scores: Sequence[Sequence[float]]) -> list[list[int]]:
        """The whole pages that each batch row is to have; by the rule of `tsa::select_pages`, and no more above a threshold."""
        rule, real = self.rule, layer.host.real[:, : layer.host.pages].any(-1)
        numbers = (share_bits(rule.keep if rule.is_bounded else 1.0), [rule.pages], 0.0, rule.sinks, rule.recent)
        wanted = []
        for b, row in enumerate(scores):
            pages = real[b].nonzero()[:, 0].tolist()
            begin = pages[0] * PAGE if pages else 0
            chosen = choose(row, pages, begin, layer.count(), *numbers)
            forced = {*pages[: rule.sinks], *range((layer.count() - 1) // PAGE - rule.recent + 1, layer.host.pages)}
            is_hit = [not rule.threshold or p in forced or row[p] > rule.threshold for p in range(layer.host.pages)]
            wanted.append([p for p in chosen if p < layer.host.pages and is_hit[p]])
        return wanted

    def _install(self, layers: Sequence[Any], wanted: list[list[int]]) -> None:
        """These pages are resident, once their copies have come; others give their slots up at once."""
        self._make_room(layers, max(map(len, wanted)))
        self._table = None
        moves: list[tuple[int, int, int]] = []  # batch row, page, slot
        for b, pages in enumerate(wanted):
            kept, coming = self.slots[b], self._coming(b)
            for page in set(kept) - set(pages):
                self._free[b].append(kept.pop(page))
            for page in pages:
                if page not in kept and page not in coming:
                    moves.append((b, page, self._free[b].pop()))
        done = self._copied(layers, moves)
        self.counts.pages_fetched += len(moves) * len(layers)
        self._arriving.append((done, moves))
        self._arrive()

    def _copied(self, layers: Sequence[Any], moves: list[tuple[int, int, int]]) -> Callable[[], bool]:
        """Copy, on a stream of its own where there are streams; returns what says whether it is done."""
        try:
            with copying(layers[0].buffers.keys.device) as done:
                for layer in layers:
                    self.counts.to_device += layer.load(moves)
        except RuntimeError:
            for b, _, slot in moves:
                self._free[b].append(slot)
            raise
        return done

    def _arrive(self) -> None:
        """Pages whose copies are done are seen from now on."""
        waiting = []
        for done, moves in self._arriving:
            if not done():
                waiting.append((done, moves))
                continue
            for b, page, slot in moves:
                self.slots[b][page] = slot
            self._table = None
        self._arriving = waiting

    def _coming(self, b: int) -> set[int]:
        return {page for _, moves in self._arriving for row, page, _ in moves if row == b}

    def _adopt(self, layers: Sequence[Any]) -> None:
        """A page that was filled since stays: from slot 0, which is written anew, to a slot of its own."""
        page = layers[0].host.pages - 1
        if layers[0].count() % PAGE or page < 0 or any(page in places for places in self.slots):
            return
        self._make_room(layers, max(map(len, self.slots)) + 1)
        moves = [(b, page, free[-1]) for b, free in enumerate(self._free)]
        for layer in layers:
            layer.keep_open_page(moves)
        for b, _, slot in moves:
            self._free[b].pop()
            self.slots[b][page] = slot
        self._table = None

    def _make_room(self, layers: Sequence[Any], pages: int) -> None:
        """Pools with slots for so many pages, for those that still arrive or fill up before the next choice, and the open one."""
        arriving = sum(len(moves) for _, moves in self._arriving)
        size = layers[0].make_room(pages + arriving + self.rule.interval // PAGE + 2)
        for layer in layers[1:]:
            layer.make_room(size)
        for free in self._free:
            free.extend(range(size - 1, max(1, self._size) - 1, -1))
        self._size = size
