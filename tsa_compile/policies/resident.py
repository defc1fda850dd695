"""Resident: keys and values lie in host memory; a decode step attends to the pages that were predicted to be needed.

Lookahead sparse attention, the residency layer of FlashMemory (arXiv 2606.09079 v2): every `interval` steps an indexer scores all
pages at a few layers, and the pages within the budget, the first and the last ones become resident on the device for the steps
to come. Its indexer is trained; ours is the mean key of each page, as `PageSparse` has it, and needs no training.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from tsa_compile.cache.resident_rule import ResidentRule
from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.common.pages import PAGE
from tsa_compile.kernels.edges import Edges
from tsa_compile.kernels.types import Selection
from tsa_compile.passes.site import AttentionSite
from tsa_compile.policies.base import Emit, Policy, check_int
from tsa_compile.policies.exact import where

ENSEMBLES = ("max", "mean")


@dataclasses.dataclass(frozen=True)
class Resident(Policy):
    """Exactly one of `keep` and `pages` says how many pages of 16 rows are on the device; one set for all layers and heads.

    Args:
        keep: share of the row's pages, in (0, 1], rounded up, sinks and recent pages included.
        pages: number of pages, sinks and recent ones included.
        interval: steps from one choice to the next; pages that fill up in between stay on the device.
        layers: numbers of the layers whose queries choose; None: those at a quarter, half and three quarters of the depth.
        ensemble: how these layers' shares of a page are joined: "max", or "mean".
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

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.pages is None):
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

    def keeping(self) -> ResidentRule:
        numbers = (self.interval, self.sinks, self.recent, self.layers, self.ensemble, self.strict, self.sample)
        return ResidentRule(float(self.keep or 0.0), self.pages or 0, *numbers)

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
