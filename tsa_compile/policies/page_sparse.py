"""PageSparse: a decode step reads the pages of the cache whose mean keys it looks at.

A page is 16 consecutive rows of the cache. Its mean key is kept beside the cache; a step scores all pages by it, normalises the
shares of each query head, and reads the best pages of each KV head exactly. Page means and the budget that grows with position:
Sparrow (arXiv 2606.08446); means and their completion: CompKV (2609.26300); normalised shares, and a basis for each page: LOCKS
(2607.24555).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from tsa_compile.cache.kv_state import KvState
from tsa_compile.cache.page_sums import PageBases, PageSums, ValueSums
from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.common.page_basis import PageBasis
from tsa_compile.kernels.common.pages import PAGE
from tsa_compile.kernels.edges import Edges
from tsa_compile.kernels.types import CompletedPages, Pages, Selection
from tsa_compile.passes.site import AttentionSite
from tsa_compile.policies.base import Emit, Policy, check_int
from tsa_compile.policies.exact import too_many_rows, where
from tsa_compile.policies.schedules import SCHEDULES

BUDGETS = ("keep", "pages", "mass", "schedule")
KINDS = ("mean", "basis")
AHEAD = 2.0  # times as many pages as are read are ranked by their bases, at least


@dataclasses.dataclass(frozen=True)
class PageSparse(Policy):
    """Exactly one of `keep`, `pages`, `mass` and `schedule` says how many pages of 16 rows are read.

    Args:
        keep: share of the row's pages, in (0, 1], rounded up, sinks and recent pages included; 1.0 is exact. A list: by KV head.
        kind: the index that ranks pages: "mean", the mean key of a page; "basis", its keys by their mean and eight directions in
            4 bits, which takes 41 bytes more for each key and KV head of dim 128.
        refine: share of the pages, in (0, 1], that the basis ranks, the best by their means, and at least twice as many as `keep`
            reads; the others keep what their means say.
        completion: whether pages that are not read enter the softmax by their mean key and value.
        pages: number of pages, sinks and recent ones included.
        mass: share of the estimated attention, in (0, 1), that the read pages hold (top-p).
        schedule: pages beside the sinks and recent ones, an entry for each 125 pages (2,000 tokens) of context; the last one
            holds from there on. Or the name of a published one (`schedules.SCHEDULES`), such as "sparrow-4b-0.86".
        sinks: first pages, always read.
        recent: last pages, always read, with the one that is not full.

    Raises:
        ValueError: a field is outside its range, or not exactly one budget is given; the message names it.
    """

    masks: ClassVar[frozenset[str]] = frozenset({"causal", "bidirectional"})  # one row sees what the mask shows, causal or not
    phases: ClassVar[frozenset[str]] = frozenset({"decode", "draft"})

    keep: float | tuple[float, ...] | None = None
    kind: str = "mean"
    completion: bool = False
    pages: int | None = None
    mass: float | None = None
    schedule: str | tuple[int, ...] | None = None
    sinks: int = 1
    recent: int = 3
    refine: float = 0.2

    def __post_init__(self) -> None:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"PageSparse takes exactly one of {', '.join(BUDGETS)}, got {' and '.join(given) or 'none'}")
        for name in ("keep", "schedule"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))  # as JSON has it
        self._check_shares()
        if self.pages is not None:
            check_int(self, "pages", 1)
        if isinstance(self.schedule, str) and self.schedule not in SCHEDULES:
            raise ValueError(f"PageSparse.schedule must be one of {sorted(SCHEDULES)}, or ints >= 0, got {self.schedule!r}")
        if self.schedule is not None and not (self.entries and all(_is_count(n) for n in self.entries)):
            raise ValueError(f"PageSparse.schedule must be ints >= 0, at least one, got {self.schedule!r}")
        check_int(self, "sinks", 0)
        check_int(self, "recent", 1)
        if self.kind not in KINDS:
            raise ValueError(f"PageSparse.kind must be one of {KINDS}, got {self.kind!r}")
        if not isinstance(self.completion, bool):
            raise ValueError(f"PageSparse.completion must be True or False, got {self.completion!r}")

    def _check_shares(self) -> None:
        shares = self.keep if isinstance(self.keep, tuple) else () if self.keep is None else (self.keep,)
        if not all(_is_number(x) and 0 < x <= 1 for x in shares) or self.keep == ():
            raise ValueError(f"PageSparse.keep must be a number in (0, 1], or one for each KV head, got {self.keep!r}")
        if not (_is_number(self.refine) and 0 < self.refine <= 1):
            raise ValueError(f"PageSparse.refine must be a number in (0, 1], got {self.refine!r}")
        if self.mass is not None and not (_is_number(self.mass) and 0 < self.mass < 1):
            raise ValueError(f"PageSparse.mass must be a number in (0, 1), got {self.mass!r}")

    @property
    def entries(self) -> tuple[int, ...]:
        """Of the schedule; none without one."""
        return SCHEDULES[self.schedule] if isinstance(self.schedule, str) else self.schedule or ()

    @property
    def budget(self) -> tuple[list[float], list[int], float]:
        """`keep`, `table` and `mass` of `tsa::select_pages`."""
        keep = [0.0] if self.keep is None else [*self.keep] if isinstance(self.keep, tuple) else [float(self.keep)]
        table = [0] if self.pages is None else [self.pages]
        if self.schedule is not None:
            table = [n + self.sinks + self.recent for n in self.entries]
        return keep, table, float(self.mass or 0.0)

    def refuse(self, site: AttentionSite) -> str | None:
        if isinstance(self.keep, tuple) and len(self.keep) not in (1, site.kv_heads):
            return f"PageSparse.keep has {len(self.keep)} shares for {site.kv_heads} KV heads"
        if not site.mask.causal and site.q_len != 1:
            return f"bidirectional: no causal mask, and {site.q_len} query rows"
        if site.operands.mask is not None:
            return "a mask as data: pages are chosen without it"
        if self.kind == "basis" and isinstance(site.head_dim, int) and site.head_dim % 2:
            return f"head dim {site.head_dim} is odd: a basis packs its halves together"
        if self.completion and site.q_len != 1:
            return f"{site.q_len} query rows: completion is for one"
        return too_many_rows(site)

    def guaranteed(self, site: AttentionSite) -> Edges:
        """The last pages, of which the open one ends with the row."""
        return Edges.every() if self.keep == 1 else Edges.bridges(PAGE, PAGE, PAGE * (self.recent - 1))

    def states(self) -> tuple[KvState, ...]:
        bases = (PageBases(),) if self.kind == "basis" else ()
        return (PageSums(), *bases, *((ValueSums(),) if self.completion else ()))

    @property
    def shareable(self) -> bool:
        return not self.completion  # by the means of the layer itself

    @property
    def computes(self) -> frozenset[str]:
        """Pages are ranked without either; means that stand for keys are not capped."""
        return frozenset({"sinks"} if self.completion else {"softcap", "sinks"})

    @property
    def by_means(self) -> bool:
        """Do mean keys say all that is asked of a page?"""
        return self.kind == "mean" and not self.completion

    def select(self, emit: Emit, site: AttentionSite, state: Any) -> Pages | CompletedPages:
        """`state`: the layer's, of the operators that `states` names; what is not there is made here, which reads every key."""
        sums, counts, capacity = self.index_of(emit, site, state)
        pages = (counts, *where(emit, site), capacity)
        logits, parts = emit(torch.ops.tsa.page_scores.default, site.operands.q, sums, *pages, site.scale)
        ranks = self._refined(emit, site, state, logits, parts, pages) if self.kind == "basis" else (logits, parts)
        rule = (site.kv_heads, *self.budget, self.sinks, self.recent)
        chosen = Pages(*emit(torch.ops.tsa.select_pages.default, *ranks, *pages, *rule))
        return CompletedPages(*chosen, logits, self._values(emit, site, state), counts) if self.completion else chosen

    def _refined(self, emit: Emit, site: AttentionSite, state: Any, logits: Any, parts: Any, pages: tuple[Any, ...]) -> Any:
        """Logits and their sums, by the bases of the best pages by their means."""
        x, (counts, *rest) = site.operands, pages
        lists = (None, None)
        if self.refine < 1:
            ranked = [max(float(self.refine), min(1.0, AHEAD * keep)) for keep in self.budget[0]]
            rule = (site.kv_heads, ranked, [0], 0.0, 0, 1)
            lists = emit(torch.ops.tsa.select_pages.default, logits, parts, *pages, *rule)
        if isinstance(state, Mapping) and "basis" in state:
            basis = tuple(state[name] for name in PageBasis._fields)
        else:
            basis = emit(torch.ops.tsa.page_basis.default, x.k, *where(emit, site), x.key_mask)
        return emit(torch.ops.tsa.refine_scores.default, x.q, logits, counts, *basis, *lists, *rest, site.scale)

    def _values(self, emit: Emit, site: AttentionSite, state: Any) -> Any:
        if isinstance(state, Mapping) and "value_sums" in state:
            return state["value_sums"]
        return emit(torch.ops.tsa.page_sums.default, site.operands.v, *where(emit, site), site.operands.key_mask)[0]

    def index_of(self, emit: Emit, site: AttentionSite, state: Any) -> tuple[Any, Any, Any]:
        """(sums, counts, rows that the index is for)."""
        x, capacity = site.operands, _capacity(emit, site)
        if isinstance(state, Mapping) and "sums" in state:
            return state["sums"], state["counts"], capacity
        return *emit(torch.ops.tsa.page_sums.default, x.k, *where(emit, site), x.key_mask), capacity

    def attend(self, emit: Emit, site: AttentionSite, selection: Selection | None) -> Any:
        assert isinstance(selection, (Pages, CompletedPages))
        x, lists, view = site.operands, selection[:2], where(emit, site)
        operands = (x.q, x.k, x.v, *lists, *view, x.key_mask, site.scale, None, x.sinks, site.softcap, site.mask.causal)
        out, lse = emit(torch.ops.tsa.page_attention.default, *operands)
        if isinstance(selection, Pages):
            return out
        index = (selection.logits, selection.sums, selection.counts, *lists)
        return emit(torch.ops.tsa.complete_pages.default, out, lse, *index, *view, _capacity(emit, site))[0]


def _capacity(emit: Emit, site: AttentionSite) -> Any:
    return site.k_len if isinstance(site.k_len, int) else emit(torch.ops.aten.sym_size.int, site.operands.k, 2)


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _is_count(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0
