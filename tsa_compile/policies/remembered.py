"""Remembered: an exact step attends to every key and remembers which mattered; the steps behind it read only those.

MAGE, arXiv 2602.14209 v2: in block diffusion a block of tokens is denoised together, over a prefix that does not change
meanwhile; its first step remembers. The score is that of two independent repositories ("eq. 5"): the mean, over the block's
queries and the query heads of a KV head, of the softmax over prefix and block. Granularity: tokens.

Vegas, arXiv 2602.07223: in self-speculation a verify step remembers for the drafts behind it, by the mean softmax of its first
and last row, which its attention leaves as it goes: no second pass over the keys. Published with one list for all heads of a
layer (`share="layer"`); here each KV head has its own by default (as in SparseSpec, arXiv 2512.01278).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, MutableMapping
from typing import Any, ClassVar

import torch

from tsa_compile.cache.kv_state import KvState
from tsa_compile.cache.listed_keys import ListedKeys
from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.edges import Edges
from tsa_compile.kernels.types import Keys, Listed, Selection
from tsa_compile.passes.site import AttentionSite
from tsa_compile.policies.base import Emit, Policy, check_int, own_edges
from tsa_compile.policies.exact import too_many_rows, where

OWN: Any = None  # of a field: as the source has it
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "denoise_first": {"keys": 512, "dense_layers": 2},
    "verify": {"keys": 256, "ratio": 0.07, "dense_layers": 0},
}
SHARES = ("kv_head", "layer")


@dataclasses.dataclass(frozen=True)
class Remembered(Policy):
    """Attention to the keys that an exact step before found, and to all that came since.

    From "denoise_first": the further steps of a block of diffusion read the list and the block. `k >= N`, a prefix of up to
    `keys` tokens, is dense attention: what a loop reports says how often that was so.

    From "verify": verify steps are exact, and drafts read `max(keys, ratio * length)` keys of those before the last verify step,
    rounded up, and every key since. Until there was one they read every key.

    Args:
        source: the phase that remembers: "denoise_first" or "verify".
        keys: tokens that a layer and KV head remember; None: 512 of a block's prefix, 256 of a verify step's.
        ratio: of a prefix: in place of `keys`, the share in (0, 1], rounded up. Of a verify step's keys: in [0, 1], as said; None
            is 0.07.
        dense_layers: first layers that read every key in all steps; None: 2 in diffusion, 0 in drafts.
        queries: rows of the block that score, evenly spread; None: all, as in MAGE. Verify steps score by two rows.
        share: "kv_head", a list for each KV head; or "layer", from verify steps alone: one for all heads of a layer, as in Vegas.

    Raises:
        ValueError: a field is outside its range; the message names it.
    """

    masks: ClassVar[frozenset[str]] = frozenset({"bidirectional"})
    phases: ClassVar[frozenset[str]] = frozenset({"denoise_first", "denoise"})

    source: str
    keys: int = OWN
    ratio: float | None = None
    dense_layers: int = OWN
    queries: int | None = None
    share: str = "kv_head"

    @property
    def computes(self) -> frozenset[str]:
        return frozenset({"sinks"} if self.source == "verify" else ())

    def __post_init__(self) -> None:
        if self.source not in DEFAULTS:
            raise ValueError(f"Remembered.source must be one of {tuple(DEFAULTS)}, got {self.source!r}")
        own: dict[str, Any] = {n: x for n, x in DEFAULTS[self.source].items() if getattr(self, n) is None}
        if self.source == "verify":
            own |= {"masks": frozenset({"causal", "bidirectional", "data"}), "phases": frozenset({"verify", "draft"})}
        for name, value in own.items():
            object.__setattr__(self, name, value)
        check_int(self, "keys", 1)
        zero = self.source == "verify"  # is it allowed?
        if self.ratio is not None and not (type(self.ratio) in (int, float) and 0 <= self.ratio <= 1 and (zero or self.ratio)):
            raise ValueError(f"Remembered.ratio must be a number in {'[' if zero else '('}0, 1], or None, got {self.ratio!r}")
        allowed = SHARES if self.source == "verify" else SHARES[:1]
        if self.share not in allowed:
            raise ValueError(f"Remembered.share must be one of {allowed} from {self.source!r}, got {self.share!r}")
        check_int(self, "dense_layers", 0)
        if self.queries is not None:
            check_int(self, "queries", 1)

    def refuse(self, site: AttentionSite) -> str | None:
        if self.source == "verify":
            return too_many_rows(site)
        if site.layer < self.dense_layers:
            return f"layer {site.layer}: the first {self.dense_layers} are dense"
        return "a mask as data: keys are remembered without it" if site.operands.mask is not None else None

    def states(self) -> tuple[KvState, ...]:
        return (ListedKeys(self.keys, self.ratio or 0.0, self.share == "layer"),) if self.source == "verify" else ()

    def guaranteed(self, site: AttentionSite) -> Edges:
        """The block itself; of a verify step every key."""
        if self.source == "verify":
            return own_edges(site) if site.phase == "verify" else Edges.none()
        return Edges.blocks(site.q_len) if isinstance(site.q_len, int) else Edges.none()

    def kept_of(self, prefix: int) -> int:
        """Tokens of a prefix of that length that are remembered."""
        return min(prefix, self.keys if self.ratio is None else math.ceil(self.ratio * prefix))

    def select(self, emit: Emit, site: AttentionSite, state: MutableMapping[str, Any] | None) -> Keys | Listed | None:
        """The first step scores, and leaves the list in `state["keys"]`, the layer's own; the further ones read it there.

        A verify step lists while it attends. None: the cache keeps no lists, or the layer stays dense, so every key is read.

        Raises:
            RuntimeError: a further step of a block without a list for its prefix.
        """
        if self.source == "verify":
            if state is None or "listed" not in state or site.layer < self.dense_layers:
                return None
            return Listed(*(state[name] for name in ("listed", "listed_counts", "since", "begin")))
        x = site.operands
        if site.phase == "denoise_first":
            prefix = int(site.k_len - site.q_len)
            choose = torch.ops.tsa.remember_keys.default
            keys = Keys(*emit(choose, x.q, x.k, site.scale, self.queries or int(site.q_len), self.kept_of(prefix)))
            if state is not None:
                state["keys"], state["prefix"] = keys, prefix
            return keys
        if state is None or state.get("prefix") != site.k_len - site.q_len:
            raise RuntimeError(
                f"Remembered: layer {site.layer} has no list for a prefix of {site.k_len - site.q_len} tokens: the first step of "
                'the block must run in phase "denoise_first", with the same state'
            )
        keys = state["keys"]
        assert isinstance(keys, Keys)
        return keys

    def attend(self, emit: Emit, site: AttentionSite, selection: Selection | None) -> Any:
        x = site.operands
        if self.source == "verify":
            lists = selection if isinstance(selection, Listed) else None
            if lists is not None and site.phase == "draft":
                return self._attend_listed(emit, site, lists)
            return self._attend_all(emit, site, lists)
        if site.phase == "denoise_first":
            exact = torch.ops.aten.scaled_dot_product_attention.default
            return emit(exact, x.q, x.k, x.v, None, 0.0, False, scale=site.scale, enable_gqa=True)
        assert isinstance(selection, Keys)
        return emit(torch.ops.tsa.key_attention.default, x.q, x.k, x.v, *selection, site.scale)[0]

    def _attend_all(self, emit: Emit, site: AttentionSite, lists: Listed | None) -> Any:
        """Exact; a verify step fills the lists by its first and its last row."""
        x, scored = site.operands, lists is not None
        cache = (x.q, x.k, x.v, *where(emit, site), x.key_mask, site.scale, x.mask, x.sinks)
        out, lse, scores = emit(torch.ops.tsa.decode_attention.default, *cache, 0.0, 0, site.mask.causal, scored)
        if lists is not None:
            written = (lists.since, lists.counts, lists.indices)
            emit(torch.ops.tsa.list_keys.default, *written, scores, lse, lists.begin, self.keys, self.ratio or 0.0)
        return out

    def _attend_listed(self, emit: Emit, site: AttentionSite, lists: Listed) -> Any:
        x = site.operands
        start, lengths = where(emit, site)[2:]
        read = (x.q, x.k, x.v, lists.indices, lists.counts, lists.since, start, lengths, x.key_mask, site.scale, x.mask, x.sinks)
        return emit(torch.ops.tsa.listed_attention.default, *read)[0]
