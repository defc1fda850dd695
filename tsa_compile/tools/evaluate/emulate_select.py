"""Which pages a decode step reads: ranking by an index, and how many each layer and head may read."""

from __future__ import annotations

import dataclasses
import math

import torch

from tsa_compile.tools.evaluate.emulate_pages import PAGE, Index, Stored, log_masses

Tensor = torch.Tensor
Budget = float | dict[int, Tensor]  # a share of the pages; or by layer, [Hk]
COMPLETIONS = ("", "mean", "index")


@dataclasses.dataclass(frozen=True)
class DecodeRule:
    """Decode by selected pages of 16 keys; one list a KV head.

    Args:
        index: what ranks the pages.
        sinks, recent: first pages, and last ones with the open one, that are always read; they count in the budget.
        completion: unselected pages enter the softmax by their mean value, with the mass that their mean key gives ("mean"), or
            with the index's own estimate ("index"); "": they are left out.
        dense_layers: layers that read everything.
        anchors: every so-many-th layer selects, the layers up to the next one read its lists, KV head by KV head; 1: all select.
        by_mass: a budget is 1 - p of top-p by the estimated masses, in place of a share of the pages.
    """

    index: Index = dataclasses.field(default_factory=Index)
    sinks: int = 1
    recent: int = 3
    completion: str = ""
    dense_layers: tuple[int, ...] = ()
    anchors: int = 1
    by_mass: bool = False

    def __post_init__(self) -> None:
        if self.completion not in COMPLETIONS:
            raise ValueError(f"DecodeRule.completion must be one of {COMPLETIONS}, got {self.completion!r}")
        if self.anchors > 1 and self.completion:
            raise ValueError("DecodeRule: layers that read another's lists have no completion, got anchors and completion")

    def bytes_per_key(self, dim: int) -> float:
        """What a step reads of the index, and of the mean values for completion: bytes for each key and KV head."""
        means = (1 + (not self.index.has_means)) * 2 * dim / PAGE if self.completion else 0.0
        return self.index.bytes_per_key(dim) / self.anchors + means


@dataclasses.dataclass(frozen=True)
class Pages:
    """The pages of n rows at the end of L keys; bool [n, P] each.

    Args:
        visible: has a key that the row sees. whole: lies before the row's open page. forced: always read.
        count: visible pages, int [n].
    """

    visible: Tensor
    whole: Tensor
    forced: Tensor
    count: Tensor

    @staticmethod
    def of(rule: DecodeRule, length: int, rows: int, device: torch.device) -> Pages:
        own = torch.arange(length - rows, length, device=device)[:, None] // PAGE
        page = torch.arange(length // PAGE, device=device)[None]
        forced = (page < rule.sinks) | ((page > own - rule.recent) & (page <= own))
        return Pages(page <= own, page < own, forced, own[:, 0] + 1)


def masses(index: Index, stored: Stored, means: Stored | None, q: Tensor, scale: float, pages: Pages, first: float) -> Tensor:
    """Estimated log mass of each page for each query row: [G, n, P].

    Args:
        stored, means: of one KV head; `means` is the index of the first stage, or None.
        q: [G, n, D].
        first: share of the pages that passes the first stage.
    """
    mass = log_masses(index, stored, q, scale)
    if means is None:
        return mass
    coarse = log_masses(Index("mean"), means, q, scale)
    return torch.where(top(shares(coarse, pages), pages, first), mass, coarse)


def shares(mass: Tensor, pages: Pages) -> Tensor:
    """Each row's shares of the masses [G, n, P] of whole pages, mean over the group's heads: [n, P]."""
    return mass.masked_fill(~pages.whole, -torch.inf).softmax(-1).nan_to_num().mean(0)


def top(share: Tensor, pages: Pages, keep: float | Tensor) -> Tensor:
    """bool [n, P]: the forced pages and the best others, `keep` of the visible pages in all, rounded up."""
    ranked = share.masked_fill(pages.forced, math.inf).masked_fill(~pages.visible, -math.inf)
    rank = ranked.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return (rank < (keep * pages.count).ceil()[:, None]) & pages.visible | pages.forced


def mass_levels(share: Tensor, pages: Pages) -> Tensor:
    """1 - the mass of heavier pages, the forced ones first: [n, P]; a page is in top-p if this exceeds 1 - p."""
    order = share.masked_fill(pages.forced, 2.0).masked_fill(~pages.visible, -1.0).argsort(dim=-1, descending=True, stable=True)
    sorted_share = share.gather(-1, order)
    return torch.empty_like(share).scatter_(-1, order, 1.0 - (sorted_share.cumsum(-1) - sorted_share))


def choose(rule: DecodeRule, share: Tensor, pages: Pages, budget: float | Tensor) -> Tensor:
    """bool [n, P]: the pages that are read."""
    if not rule.by_mass:
        return top(share, pages, budget)
    return (mass_levels(share, pages) > budget) & pages.whole | pages.forced
