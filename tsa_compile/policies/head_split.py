"""RTPurbo: a few query heads look things up and need the whole context; all others read the first tokens and the last ones.

"Full Attention Strikes Back", arXiv 2605.16928 v2. Some 15 % of the query heads are retrieval heads, which `learn/head_roles.py`
finds; the others read 4 and 8,192 tokens. A step's retrieval heads score every key by a learned projection of queries and keys
before their rotation (`learn/indexer.py`), and attend exactly to the fewest pages that hold a share of that softmax. Ours: pages
of 16 tokens in place of 64; the heads of a KV head read what any of them chose, so that its keys are read once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from tsa_compile.cache.kv_state import KvState
from tsa_compile.cache.projected_keys import ProjectedKeys
from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.common.pages import PAGE
from tsa_compile.kernels.edges import Edges
from tsa_compile.kernels.types import PageBitmap, Pages, Selection
from tsa_compile.passes.site import VERIFY_ROWS, AttentionSite
from tsa_compile.policies.base import Emit, Policy, check_int
from tsa_compile.policies.block_sparse import padding, places
from tsa_compile.policies.exact import where
from tsa_compile.policies.page_sparse import PageSparse

ALL = 1 << 24  # pages: more than any row has


@dataclasses.dataclass(frozen=True)
class HeadSplit(Policy):
    """A layer whose query heads have roles. Which heads look things up differs by layer: a plan has a rule for each.

    In prefill these heads read every key, and local ones whole key blocks of 64: those that the window of a block of 128 rows,
    and the sinks, touch. In decode keys are read by KV head: one of its query heads that looks things up makes what it chose be
    read, so heads that share one should share a role where the choice is free. Without `keep` and `mass` these heads read the
    whole context in decode, too.

    Args:
        retrieval: query heads of the layer that look things up; none: all are local.
        keep: in place of the whole context: share of the pages that their KV heads read, in (0, 1], as `PageSparse` has it.
        sinks: first tokens that local heads read.
        window: last tokens that they read, the query's own included.
        mass: in place of the whole context: share of a head's projected softmax, in (0, 1), that the pages hold which it reads.
            Published: 0.9. Needs a plan with weights (`Plan.weights`), and a model that rotates queries and keys (RoPE).

    Raises:
        ValueError: a field is outside its range, or `keep` and `mass` are both given; the message names it.
    """

    masks: ClassVar[frozenset[str]] = PageSparse.masks
    phases: ClassVar[frozenset[str]] = frozenset({"prefill", "decode", "draft"})
    computes: ClassVar[frozenset[str]] = frozenset({"softcap", "sinks"})  # in decode
    by_rows: ClassVar[bool] = True

    retrieval: tuple[int, ...]
    keep: float = 1.0
    sinks: int = 4
    window: int = 8192
    mass: float | None = None

    def __post_init__(self) -> None:
        heads = tuple(self.retrieval) if isinstance(self.retrieval, (list, tuple)) else None
        if heads is None or not all(type(h) is int and h >= 0 for h in heads) or len({*heads}) != len(heads):
            raise ValueError(f"HeadSplit.retrieval must be numbers of query heads, each once, got {self.retrieval!r}")
        object.__setattr__(self, "retrieval", heads)  # as JSON has it, a list
        check_int(self, "sinks", 0)
        check_int(self, "window", 1)
        if not _is_number(self.keep) or not 0 < self.keep <= 1:
            raise ValueError(f"HeadSplit.keep must be a number in (0, 1], got {self.keep!r}")
        if self.mass is not None and not (_is_number(self.mass) and 0 < self.mass < 1):
            raise ValueError(f"HeadSplit.mass must be a number in (0, 1), or None, got {self.mass!r}")
        if self.mass is not None and self.keep != 1:
            raise ValueError(f"HeadSplit takes keep or mass, got {self.keep} and {self.mass}")

    def refuse(self, site: AttentionSite) -> str | None:
        if self.retrieval and isinstance(site.heads, int) and max(self.retrieval) >= site.heads:
            return f"HeadSplit.retrieval names head {max(self.retrieval)} of {site.heads}"
        if site.phase == "prefill" and (site.softcap or site.sinks):
            return f"{'softcap' if site.softcap else 'attention sinks'}: roles of heads have none in prefill"
        if site.phase == "prefill":
            return None if site.mask.causal else "bidirectional: no causal mask"
        if site.q_len != 1:
            return f"{site.q_len} query rows: roles of heads are for one"
        return PageSparse(pages=1).refuse(site)

    def guaranteed(self, site: AttentionSite) -> Edges:
        return Edges.window(self.window)

    def reads_projected(self, site: AttentionSite) -> bool:
        return self.mass is not None and bool(self.retrieval) and site.phase != "prefill"

    def states(self) -> tuple[KvState, ...]:
        if not self.retrieval:
            return ()
        return (ProjectedKeys(),) if self.mass is not None else PageSparse(pages=1).states() if self.keep < 1 else ()

    def select(self, emit: Emit, site: AttentionSite, state: Any) -> Pages | PageBitmap:
        """In prefill key blocks. In decode pages of each KV head: the first and last ones that its local heads may see, and what
        heads that look things up chose.

        Raises:
            ValueError: there is a `mass`, and no projected keys in `state`.
        """
        if site.phase == "prefill":
            return self._blocks(emit, site)
        if self.keep < 1 and self.retrieval:
            return self._by_means(emit, site, state)
        x, (_, _, start, lengths) = site.operands, where(emit, site)
        capacity = site.k_len if isinstance(site.k_len, int) else emit(torch.ops.aten.sym_size.int, x.k, 2)
        lists, owners = self._lists(emit, site, state, (start, lengths), capacity)
        group = site.heads // site.kv_heads
        heads = [[h for h in range(g * group, (g + 1) * group) if h not in self.retrieval] for g in range(site.kv_heads)]
        sinks, recent = ([n if local else 0 for local in heads] for n in (touched(self.sinks), touched(self.window)))
        if self.mass is None:
            recent = [ALL if len(local) < group else n for local, n in zip(heads, recent, strict=True)]
        return Pages(*emit(torch.ops.tsa.join_pages.default, *lists, start, lengths, capacity, owners, sinks, recent))

    def _blocks(self, emit: Emit, site: AttentionSite) -> PageBitmap:
        x, (start, lengths, _), options = site.operands, padding(emit, site), places(site)[2]
        if site.past and not isinstance(site.q_len, int):  # the operator alone knows how many rows there are
            options["min_queries"] = max(self.min_queries, VERIFY_ROWS)
        local = [h not in self.retrieval for h in range(site.heads)]
        rule = (local, self.window, self.sinks)
        return PageBitmap(emit(torch.ops.tsa.role_key_blocks.default, x.q, x.k, start, lengths, *rule, **options))

    def _lists(self, emit: Emit, site: AttentionSite, state: Any, row: tuple[Any, Any], capacity: Any) -> tuple[Any, list[int]]:
        """The pages of each head that looks things up, indices and counts, and its KV head; no lists where none is needed."""
        x = site.operands
        if self.mass is None or not self.retrieval:
            row_of_none = emit(torch.ops.aten.slice.Tensor, emit(torch.ops.aten.select.int, x.q, 2, 0), 1, 0, 0)
            none = emit(torch.ops.aten.to.dtype, row_of_none, torch.int32)  # [B, 0, D]
            return (none, emit(torch.ops.aten.select.int, none, 2, 0)), []
        if not isinstance(state, Mapping) or "index" not in state:
            raise ValueError("HeadSplit.mass needs the projected keys that the cache of tsa_compile.transform keeps")
        kept = (state["index"], state["positions"], state["query"], state["frequencies"])
        rotation = (list(self.retrieval), state["interleaved"], state["factor"])
        logits, parts = emit(torch.ops.tsa.projected_scores.default, x.q, *kept, *row, x.key_mask, *rotation)
        pages = (state["counts"], None, 1, *row, capacity, len(self.retrieval))
        lists = emit(torch.ops.tsa.select_pages.default, logits, parts, *pages, [0.0], [0], float(self.mass), 0, 1)
        return lists, [h * site.kv_heads // site.heads for h in self.retrieval]

    def _by_means(self, emit: Emit, site: AttentionSite, state: Any) -> Pages:
        group = site.heads // site.kv_heads
        keep = [float(self.keep) if any(h // group == g for h in self.retrieval) else 0.0 for g in range(site.kv_heads)]
        sums, counts, capacity = PageSparse(pages=1).index_of(emit, site, state)
        pages = (counts, *where(emit, site), capacity)
        logits, parts = emit(torch.ops.tsa.page_scores.default, site.operands.q, sums, *pages, site.scale)
        rule = (site.kv_heads, keep, [0], 0.0, touched(self.sinks), touched(self.window))
        return Pages(*emit(torch.ops.tsa.select_pages.default, logits, parts, *pages, *rule))

    def attend(self, emit: Emit, site: AttentionSite, selection: Selection | None) -> Any:
        x = site.operands
        if isinstance(selection, PageBitmap):
            (start, lengths, key_mask), (blocks, block, length) = padding(emit, site), places(site)
            rest = (blocks, block, start, lengths, key_mask, site.scale, False)
            return emit(torch.ops.tsa.key_block_attention.default, x.q, x.k, x.v, selection.bits, *rest, **length)[0]
        assert isinstance(selection, Pages)
        windows = [0 if h in self.retrieval else self.window for h in range(site.heads)]
        read, masks = (x.q, x.k, x.v, *selection, *where(emit, site)), (None, x.sinks, site.softcap, site.mask.causal)
        return emit(torch.ops.tsa.page_attention.default, *read, x.key_mask, site.scale, *masks, windows, self.sinks)[0]


def touched(tokens: int) -> int:
    """Pages that so many consecutive tokens may lie in."""
    return 0 if tokens == 0 else (tokens - 2) // PAGE + 2


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)
