"""MAGE: the first denoising step of a block attends to every key and remembers which mattered; the further steps read only those.

In block diffusion a block of tokens is denoised together, over a prefix that does not change meanwhile. "MAGE", arXiv 2602.14209
v2; the score is that of two independent repositories ("eq. 5"): the mean, over the block's queries and the query heads of a KV
head, of the softmax over prefix and block. Granularity: tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import MutableMapping
from typing import Any, ClassVar

import torch

from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.types import Edges, Keys, Selection
from tsa_compile.passes.site import AttentionSite
from tsa_compile.policies.base import Emit, Policy, check_int

SOURCES = ("denoise_first",)


@dataclasses.dataclass(frozen=True)
class Remembered(Policy):
    """Attention of a block's denoising steps to the keys that its first step found, and to the block itself.

    `k >= N`, a prefix of up to `keys` tokens, is dense attention: what a loop reports says how often that was so.

    Args:
        source: the phase that selects: "denoise_first".
        keys: tokens of the prefix that a layer and KV head remember.
        share: in place of `keys`, the share of the prefix in (0, 1], rounded up.
        dense_layers: first layers that stay dense in all steps.
        queries: rows of the block that score, evenly spread; None: all, as in the paper.

    Raises:
        ValueError: a field is outside its range; the message names it.
    """

    masks: ClassVar[frozenset[str]] = frozenset({"bidirectional"})
    phases: ClassVar[frozenset[str]] = frozenset({"denoise_first", "denoise"})

    source: str
    keys: int = 512
    share: float | None = None
    dense_layers: int = 2
    queries: int | None = None

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"Remembered.source must be one of {SOURCES}, got {self.source!r}")
        check_int(self, "keys", 1)
        if self.share is not None and not (type(self.share) in (int, float) and 0 < self.share <= 1):
            raise ValueError(f"Remembered.share must be a number in (0, 1], or None, got {self.share!r}")
        check_int(self, "dense_layers", 0)
        if self.queries is not None:
            check_int(self, "queries", 1)

    def refuse(self, site: AttentionSite) -> str | None:
        if site.layer < self.dense_layers:
            return f"layer {site.layer}: the first {self.dense_layers} are dense"
        return "a mask as data: keys are remembered without it" if site.operands.mask is not None else None

    def guaranteed(self, site: AttentionSite) -> Edges:
        """The block itself."""
        return Edges.blocks(site.q_len) if isinstance(site.q_len, int) else Edges.none()

    def kept_of(self, prefix: int) -> int:
        """Tokens of a prefix of that length that are remembered."""
        return min(prefix, self.keys if self.share is None else math.ceil(self.share * prefix))

    def select(self, emit: Emit, site: AttentionSite, state: MutableMapping[str, Any] | None) -> Keys:
        """The first step scores, and leaves the list in `state["keys"]`, the layer's own; the further ones read it there.

        Raises:
            RuntimeError: a further step without a list for its prefix.
        """
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
        if site.phase == "denoise_first":
            exact = torch.ops.aten.scaled_dot_product_attention.default
            return emit(exact, x.q, x.k, x.v, None, 0.0, False, scale=site.scale, enable_gqa=True)
        assert isinstance(selection, Keys)
        return emit(torch.ops.tsa.key_attention.default, x.q, x.k, x.v, *selection, site.scale)[0]
