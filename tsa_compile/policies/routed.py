"""Routed: a sequence's keys are spread over a process group; queries go to the keys, and partial results come back.

Each rank attends to the pages that it holds, and what the ranks found is merged in a fixed tree: exact, and the same on every
rank. "Move the Query, Not the Cache", arXiv 2606.01502. With `inner=PageSparse(...)` each rank scores its own pages, and together
they read the pages that one process with all of them would. With `link=`, measured numbers, the keys come to every rank where
that is cheaper than to send queries to them (`cache/route_choice.py`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import nn

from tsa_compile.cache.kv_state import KvState
from tsa_compile.cache.route_choice import RouteRule
from tsa_compile.cache.route_cost import Link
from tsa_compile.cache.sharded import Shard
from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.types import Pages, Selection
from tsa_compile.passes.site import AttentionSite
from tsa_compile.policies.base import Emit, Policy, build, check_int
from tsa_compile.policies.exact import Exact, where
from tsa_compile.policies.over_group import OverGroup
from tsa_compile.policies.page_sparse import PageSparse

EVERY_KEY = Exact()


@dataclasses.dataclass(frozen=True)
class Routed(OverGroup):
    """Decode over a process group, every rank of which runs the same model on the same tokens (`torchrun`, `tsa.transform`).

    Args:
        inner: which keys are read: `Exact()`, or `PageSparse(...)`, whose budget is of the whole sequence. Pages are chosen as on
            one process where padding is on the left alone.
        group: name of the process group (`group.group_name`) that shares the keys; None: all processes.
        link: what exchanges take (`tsa-compile tune --distributed`), the same numbers on every rank. After each prompt the cost
            model then decides whether queries are routed, or every rank fetches all keys once, for which it must have room.
            None: queries are routed. For `Exact()` alone.
        steps: decode steps that a request is expected to take; over these the cost of a fetch is spread.

    Raises:
        ValueError: a field is outside its range; the message names it.
    """

    phases: ClassVar[frozenset[str]] = frozenset({"decode"})
    masks: ClassVar[frozenset[str]] = frozenset({"causal", "bidirectional"})  # one row sees what the mask shows, causal or not

    inner: Exact | PageSparse = EVERY_KEY
    link: Link | None = None
    steps: int = 256

    def __post_init__(self) -> None:
        if not isinstance(self.inner, (Exact, PageSparse)):
            raise ValueError(f"Routed.inner must be Exact() or a PageSparse, got {self.inner!r}")
        if isinstance(self.inner, PageSparse) and not self.inner.by_means:
            raise ValueError(f"Routed.inner ranks pages by mean keys, without completion, got {self.inner!r}")
        super().__post_init__()
        check_int(self, "steps", 1)
        if self.link is not None and not isinstance(self.link, Link):
            raise ValueError(f"Routed.link must be a tsa_compile.cache.route_cost.Link, or None, got {self.link!r}")
        if self.link is not None and not isinstance(self.inner, Exact):
            raise ValueError(f"Routed.link is for inner=Exact(): the cost model knows no lists of pages, got {self.inner!r}")
        if self.link is not None and self.link.recompute is not None:
            raise ValueError("Routed.link.recompute must be None: keys are routed to or fetched, and not computed anew")

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> Policy:
        if isinstance(fields.get("link"), dict):
            fields = {**fields, "link": build(Link, fields["link"])}
        return super()._from_fields(fields)

    def keeping(self, model: nn.Module | None = None) -> Shard:
        return Shard.of(self.group_name, None if self.link is None else RouteRule(self.link, self.steps, _group_of(model)))

    def refuse(self, site: AttentionSite) -> str | None:
        if site.q_len != 1:
            return f"{site.q_len} query rows: Routed is for one"
        if site.operands.mask is not None or site.operands.sinks is not None:
            return "a mask as data, or sinks: Routed takes keys that are there or not"
        return self.inner.refuse(site)

    def states(self) -> tuple[KvState, ...]:
        return self.inner.states()

    def select(self, emit: Emit, site: AttentionSite, state: Any) -> Pages | None:
        """This rank's pages; `state` as for `PageSparse`."""
        if isinstance(self.inner, Exact):
            return None
        sums, counts, capacity = self.inner.index_of(emit, site, state)
        _, _, start, lengths = where(emit, site)
        rule = (*self.inner.budget, self.inner.sinks, self.inner.recent)
        args = (site.operands.q, sums, counts, start, lengths, capacity, site.scale, *rule, self.group_name)
        return Pages(*emit(torch.ops.tsa.routed_pages.default, *args))

    def attend(self, emit: Emit, site: AttentionSite, selection: Selection | None) -> Any:
        pages = (None, None) if selection is None else selection
        assert len(pages) == 2
        x, (_, _, start, lengths) = site.operands, where(emit, site)
        args = (x.q, x.k, x.v, *pages, start, lengths, x.key_mask, site.scale, False, self.group_name)
        return emit(torch.ops.tsa.routed_attention.default, *args)[0]


def _group_of(model: Any) -> int:
    """Query heads of a KV head, by the model's config."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads, kv_heads = (getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if not heads:
        raise ValueError(f"Routed.link: the config of {type(model).__name__} does not say its num_attention_heads")
    return int(heads) // int(kv_heads or heads)
