"""RTPurbo: a few query heads look things up and need the whole context; all others read the first tokens and the last ones.

"Full Attention Strikes Back", arXiv 2605.16928 v2. Published: some 15 % of the query heads are retrieval heads, which
`learn/head_roles.py` finds; the others read 4 and 8,192 tokens. Of the paper's decode the roles are here; retrieval heads read
every key, or the best pages by their mean keys (`PageSparse`) in place of a learned projection and top-p. No prefill is built.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from tsa_compile.cache.kv_state import KvState
from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.common.pages import PAGE
from tsa_compile.kernels.edges import Edges
from tsa_compile.kernels.types import Pages, Selection
from tsa_compile.passes.site import AttentionSite
from tsa_compile.policies.base import Emit, Policy, check_int
from tsa_compile.policies.exact import where
from tsa_compile.policies.page_sparse import PageSparse


@dataclasses.dataclass(frozen=True)
class HeadSplit(Policy):
    """Decode of a layer whose query heads have roles. Which heads look things up differs by layer: a plan has a rule for each.

    Keys are read by KV head: one of its query heads that looks things up makes all of its keys be read, so heads that share one
    should share a role where the choice is free.

    Args:
        retrieval: query heads of the layer that read the whole context; none: all are local.
        keep: share of the pages that their KV heads read, in (0, 1], as `PageSparse` has it; 1.0: every key.
        sinks: first tokens that local heads read.
        window: last tokens that they read, the query's own included.

    Raises:
        ValueError: a field is outside its range; the message names it.
    """

    masks: ClassVar[frozenset[str]] = PageSparse.masks
    phases: ClassVar[frozenset[str]] = frozenset({"decode", "draft"})

    retrieval: tuple[int, ...]
    keep: float = 1.0
    sinks: int = 4
    window: int = 8192

    def __post_init__(self) -> None:
        heads = tuple(self.retrieval) if isinstance(self.retrieval, (list, tuple)) else None
        if heads is None or not all(type(h) is int and h >= 0 for h in heads) or len({*heads}) != len(heads):
            raise ValueError(f"HeadSplit.retrieval must be numbers of query heads, each once, got {self.retrieval!r}")
        object.__setattr__(self, "retrieval", heads)  # as JSON has it, a list
        check_int(self, "sinks", 0)
        check_int(self, "window", 1)
        if isinstance(self.keep, bool) or not isinstance(self.keep, (int, float)) or not 0 < self.keep <= 1:
            raise ValueError(f"HeadSplit.keep must be a number in (0, 1], got {self.keep!r}")

    def refuse(self, site: AttentionSite) -> str | None:
        if site.q_len != 1:
            return f"{site.q_len} query rows: roles of heads are for one"
        if self.retrieval and isinstance(site.heads, int) and max(self.retrieval) >= site.heads:
            return f"HeadSplit.retrieval names head {max(self.retrieval)} of {site.heads}"
        return PageSparse(pages=1).refuse(site)

    def guaranteed(self, site: AttentionSite) -> Edges:
        return Edges.window(self.window)

    def states(self) -> tuple[KvState, ...]:
        return PageSparse(pages=1).states()

    def select(self, emit: Emit, site: AttentionSite, state: Any) -> Pages:
        """Pages of each KV head: the first and last ones that local heads may see, and of heads that look things up `keep`."""
        group = site.heads // site.kv_heads
        keep = [float(self.keep) if any(h // group == g for h in self.retrieval) else 0.0 for g in range(site.kv_heads)]
        sums, counts, capacity = PageSparse(pages=1).index_of(emit, site, state)
        pages = (counts, *where(emit, site), capacity)
        logits, parts = emit(torch.ops.tsa.page_scores.default, site.operands.q, sums, *pages, site.scale)
        rule = (site.kv_heads, keep, [0], 0.0, _touched(self.sinks), _touched(self.window))
        return Pages(*emit(torch.ops.tsa.select_pages.default, logits, parts, *pages, *rule))

    def attend(self, emit: Emit, site: AttentionSite, selection: Selection | None) -> Any:
        assert isinstance(selection, Pages)
        x = site.operands
        windows = [0 if h in self.retrieval else self.window for h in range(site.heads)]
        operands = (x.q, x.k, x.v, *selection, *where(emit, site), x.key_mask, site.scale, None, x.sinks, 0.0, site.mask.causal)
        return emit(torch.ops.tsa.page_attention.default, *operands, windows, self.sinks)[0]


def _touched(tokens: int) -> int:
    """Pages that so many consecutive tokens may lie in."""
    return 0 if tokens == 0 else (tokens - 2) // PAGE + 2
