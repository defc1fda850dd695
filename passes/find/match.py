"""What a matcher finds: the operands of one attention, before anything is proven or decided."""

from __future__ import annotations

import dataclasses

import torch.fx as fx

from tsa_compile.passes.prove_mask.prove import MaskSource
from tsa_compile.passes.site import BHLD, Layouts


@dataclasses.dataclass(frozen=True)
class Match:
    """`node = softmax(scale * q k^T, masked by sources) v`.

    Args:
        node: the output.
        form: "sdpa", "manual" or "flex".
        q, k, v: the operands as the attention reads them.
        scale: None if it is not a constant of the graph.
        sources: all that masks the scores.
        reader: the first node that reads q and k.
        layouts: the order of dimensions of the operands and the output.
        obstacle: why the site must stay as it is.
    """

    node: fx.Node
    form: str
    q: fx.Node
    k: fx.Node
    v: fx.Node
    scale: float | None
    sources: tuple[MaskSource, ...]
    reader: fx.Node
    layouts: Layouts = BHLD
    obstacle: str | None = None


class Unrecognised(Exception):
    """Something that looks like attention but is not in a form known; the message says what was seen."""
