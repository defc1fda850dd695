"""The measurements of a calibration of `PageSparse`: each over all texts, one text at a time, each made once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tsa_compile.learn.equal_pairs import cheapest
from tsa_compile.learn.layer_costs import named
from tsa_compile.learn.page_meter import Keeps, PageMeter, PageSample
from tsa_compile.learn.state import Measured
from tsa_compile.plan import Plan
from tsa_compile.progress import Advance, Start

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class PageTables:
    """What `PageSparse` costs and reads by budget and KV head, along exact runs; means over texts.

    Args:
        keeps: ascending.
        errors, read: float64 `[keeps, KV heads of all layers]`.
        layers: attention modules, in the order of the columns. lists: KV heads of each.
    """

    keeps: tuple[float, ...]
    errors: Tensor
    read: Tensor
    layers: tuple[str, ...]
    lists: tuple[int, ...]

    def fit(self, share: float, weight: Mapping[str, float] | None = None) -> dict[str, tuple[float, ...]]:
        """A budget for each KV head: the least summed error that `share` of all heads' pages allows.

        Args:
            weight: what an error of each layer counts; None: all alike.
        """
        of_layer = [1.0 if weight is None else weight[layer] for layer in self.layers]
        counts = torch.tensor(of_layer, dtype=torch.float64).repeat_interleave(torch.tensor(self.lists))
        chosen = cheapest(self.errors * counts, self.read / self.read.shape[1], share)
        parts = torch.tensor(self.keeps, dtype=torch.float64)[chosen].split(list(self.lists))
        return {layer: tuple(part.tolist()) for layer, part in zip(self.layers, parts, strict=True)}

    def one(self, keep: float) -> dict[str, tuple[float, ...]]:
        """The same budget for all."""
        return {layer: (keep,) * n for layer, n in zip(self.layers, self.lists, strict=True)}

    def errors_at(self, keep: float) -> dict[str, float]:
        """The summed error of each layer at the tried budget next to `keep`."""
        nearest = min(range(len(self.keeps)), key=lambda n: abs(self.keeps[n] - keep))
        return {layer: float(x.sum()) for layer, x in zip(self.layers, self.errors[nearest].split(list(self.lists)), strict=True)}


class PageRun:
    """Samples are means over the texts; what is in the state is not measured again."""

    def __init__(self, meter: PageMeter, texts: Sequence[Tensor], measured: Measured) -> None:
        self.meter, self.texts, self.measured = meter, texts, measured

    def tables(self, keeps: Sequence[float], start: Start) -> PageTables:
        tried, found = tuple(sorted(keeps)), []
        advance = start("each budget", len(self.texts))
        for n, ids in enumerate(self.texts):
            make = lambda ids=ids: [x.tolist() for x in self.meter.tables(ids, tried)]  # noqa: E731
            found.append(self.measured.get(f"text {n}, tables of {tried}", make))
            advance()
        errors, read = (torch.tensor(x, dtype=torch.float64).mean(0) for x in zip(*found, strict=True))
        return PageTables(tried, errors, read, tuple(self.meter.layers), tuple(self.meter.lists))

    def sample(self, keeps: Keeps, advance: Advance) -> PageSample:
        """The largest of `worst`, the mean of all else."""
        found = []
        for n, ids in enumerate(self.texts):
            measure = functools.partial(self._sample, ids, keeps)
            found.append(PageSample(**self.measured.get(f"text {n}, {named('budgets', keeps)}", measure)))
            advance()
        mean = PageSample(*(sum(field) / len(found) for field in zip(*map(dataclasses.astuple, found), strict=True)))
        return dataclasses.replace(mean, worst=max(one.worst for one in found))

    def alone(self, keeps: Keeps, start: Start) -> dict[str, float]:
        """Divergence when that layer alone is sparse."""
        advance = start("each layer alone", len(keeps) * len(self.texts))
        return {layer: self.sample({layer: keeps[layer]}, advance).kl for layer in keeps}

    def whole(self, plan: Plan) -> tuple[float, float]:
        """(mean KL, largest) of the plan as `transform` runs it."""
        found = [self.meter.whole(ids, plan) for ids in self.texts]
        return sum(kl for kl, _ in found) / len(found), max(worst for _, worst in found)

    def _sample(self, ids: Tensor, keeps: Keeps) -> dict[str, Any]:
        return dataclasses.asdict(self.meter.sample(ids, keeps))
