"""Resident: keys and values lie in host memory; a decode step attends to the pages that were predicted to be needed.

Lookahead sparse attention, the residency layer of FlashMemory (arXiv 2606.09079 v2): every `interval` steps an indexer scores all
pages at a few layers, and the pages within the budget, the first and the last ones become resident on the device for the steps
to come. Its indexer is trained (`index="learned"`, `learn/lookahead.py`); by default it is the mean key of each page, as
`PageSparse` has it, which needs no training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from tsa_compile.cache.lookahead_index import LookaheadIndex, lookaheads
from tsa_compile.cache.resident_rule import ResidentRule
from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.common.pages import PAGE
from tsa_compile.kernels.edges import Edges
from tsa_compile.kernels.types import Selection
from tsa_compile.passes.site import AttentionSite
from tsa_compile.policies.base import Emit, Policy, check_int
from tsa_compile.policies.exact import where

ENSEMBLES = ("max", "mean")
INDEXES = ("mean", "learned")


@dataclasses.dataclass(frozen=True)
class Resident(Policy):
    """Exactly one of `keep` and `pages` says how many pages of 16 rows are on the device; one set for all layers and heads.
    With a threshold they are what there is at most, and neither has to be given.

    Args:
        keep: share of the row's pages, in (0, 1], rounded up, sinks and recent pages included.
        pages: number of pages, sinks and recent ones included.
        interval: steps from one choice to the next; pages that fill up in between stay on the device.
        layers: numbers of the layers whose queries choose; None: those at a quarter, half and three quarters of the depth, or
            those that have a learned index.
        ensemble: how these layers' scores of a page are joined: "max", or "mean".
        index: "mean": a page's score is its share of the attention, by its mean key; "learned": the probability that it will be
            needed, in (0, 1), by the paper's retriever. That takes a plan with weights (`Plan.weights`, `learn/lookahead.py`).
        threshold: of pages that are resident, the learned index says a higher score; published: 0.5.
        sinks: first pages, always resident.
        recent: last pages, always resident.
        strict: every step also reads the other pages from the host: exact, at the price of their bytes.
        sample: every so many steps measure the mass that lies outside of the set, which reads the other pages; 0: never.

    The first step after a prompt reads every page, as no query has chosen yet.

    Raises:
        ValueError: a field is outside its range; the message names it.
    """

    phases: ClassVar[frozenset[str]] = frozenset({"decode"})
    masks: ClassVar[frozenset[str]] = frozenset({"causal", "bidirectional"})  # one row sees what the mask shows, causal or not
    needs_session: ClassVar[bool] = True

    keep: float | None = None
    pages: int | None = None
    interval: int = 64
    layers: tuple[int, ...] | None = None
    ensemble: str = "max"
    sinks: int = 1
    recent: int = 4
    strict: bool = False
    sample: int = 0
    index: str = "mean"
    threshold: float | None = None

    def __post_init__(self) -> None:
        given = (self.keep is not None) + (self.pages is not None)
        if given > 1 or (given == 0 and self.threshold is None):
            raise ValueError(f"Resident takes exactly one of keep and pages, got {self.keep!r} and {self.pages!r}")
        if self.keep is not None and not (type(self.keep) in (int, float) and 0 < self.keep <= 1):
            raise ValueError(f"Resident.keep must be a number in (0, 1], got {self.keep!r}")
        if self.pages is not None:
            check_int(self, "pages", 1)
        for name, low in (("interval", 1), ("sinks", 0), ("recent", 1), ("sample", 0)):
            check_int(self, name, low)
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))  # as JSON has it
        if self.layers is not None and not (self.layers and all(type(n) is int and n >= 0 for n in self.layers)):
            raise ValueError(f"Resident.layers must be layer numbers, at least one, or None, got {self.layers!r}")
        if self.ensemble not in ENSEMBLES:
            raise ValueError(f"Resident.ensemble must be one of {ENSEMBLES}, got {self.ensemble!r}")
        if type(self.strict) is not bool:
            raise ValueError(f"Resident.strict must be True or False, got {self.strict!r}")
        self._check_index()

    def _check_index(self) -> None:
        if self.index not in INDEXES:
            raise ValueError(f"Resident.index must be one of {INDEXES}, got {self.index!r}")
        if self.threshold is None:
            return
        if not (type(self.threshold) in (int, float) and 0 < self.threshold < 1):
            raise ValueError(f"Resident.threshold must be a number in (0, 1), or None, got {self.threshold!r}")
        if self.index != "learned":
            raise ValueError("Resident.threshold is of scores of a learned index: give index='learned'")

    def keeping(self, model: nn.Module | None = None) -> ResidentRule:
        numbers = (self.interval, self.sinks, self.recent, self.layers, self.ensemble, self.strict, self.sample)
        found = {} if model is None or self.index == "mean" else lookaheads(model)
        own = tuple((n, found[n]) for n in sorted(found) if self.layers is None or n in self.layers)
        return ResidentRule(float(self.keep or 0.0), self.pages or 0, *numbers, float(self.threshold or 0.0), own)

    def check_index(self, known: Mapping[int, LookaheadIndex]) -> None:
        """Raise a ValueError unless the model has a learned index, by the layer's number, wherever this needs one."""
        if self.index == "mean":
            return
        if not known:
            raise ValueError("Resident.index='learned' needs weights; Plan.weights names none")
        missing = sorted(set(self.layers or ()) - set(known))
        if missing:
            raise ValueError(f"Resident.layers: no learned index for layers {missing}; the weights are for {sorted(known)}")

    def refuse(self, site: AttentionSite) -> str | None:
        if site.q_len != 1:
            return f"{site.q_len} query rows: Resident is for one"
        if site.operands.mask is not None or site.operands.sinks is not None:
            return "a mask as data, or sinks: Resident takes keys that are there or not"
        return None

    def guaranteed(self, site: AttentionSite) -> Edges:
        """The last pages, of which the open one ends with the row."""
        return Edges.bridges(PAGE, PAGE, PAGE * (self.recent - 1))

    def attend(self, emit: Emit, site: AttentionSite, selection: Selection | None) -> Any:
        x, (_, _, start, lengths) = site.operands, where(emit, site)
        return emit(torch.ops.tsa.resident_attention.default, x.q, x.k, x.v, start, lengths, x.key_mask, site.scale)[0]
