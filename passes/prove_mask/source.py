"""What masks scores, as a matcher finds it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.fx as fx

from tsa_compile.passes.site import Size


@dataclasses.dataclass(frozen=True)
class MaskSource:
    """One way in which scores are masked.

    Args:
        kind: "causal" (SDPA's `is_causal`: top-left), "mask" (SDPA's `attn_mask`: bool, or float that is added), "add",
            "show" (scores where true, else `fill`) or "hide" (`fill` where true).
        mask: the tensor; None for "causal".
        fill: what "show" and "hide" put in place of a score: a number or a node.
        factor: what masked scores are multiplied by before the softmax.
        split: (batch, heads) where the scores are masked as `[batch, heads, queries, keys]` and were multiplied with both as one
            dimension; None: they are masked as they were multiplied.
    """

    kind: str
    mask: fx.Node | None = None
    fill: Any = None
    factor: float = 1.0
    split: tuple[Size, Size] | None = None
