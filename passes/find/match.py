"""What a matcher finds: the operands of one attention, before anything is proven or decided."""

from __future__ import annotations

import dataclasses

import torch.fx as fx

from tsa_compile.passes.facts.names import tensor
from tsa_compile.passes.prove_mask.source import MaskSource
from tsa_compile.passes.site import Size


@dataclasses.dataclass(frozen=True)
class Layouts:
    """The order of dimensions of an attention's tensors: b batch, h heads, l length, d head dim.

    Where none has an "h" (rank 3), each entry of the batch is one head, or batch and heads are one dimension.
    """

    q: str = "bhld"
    k: str = "bhld"
    v: str = "bhld"
    out: str = "bhld"


BHLD = Layouts()


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
        softcap: the scores are `softcap * tanh(scale * q k^T / softcap)` before they are masked; 0: they are not capped.
        sinks: `[B, H, Lq, 1]`, a column of the softmax without a value, or None.
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
    softcap: float = 0.0
    sinks: fx.Node | None = None

    def size(self, operand: str, dim: str) -> Size:
        """Length of a dimension ("b", "h", "l" or "d") of "q", "k" or "v"; 1 where the operand does not have it."""
        layout: str = getattr(self.layouts, operand)
        if dim not in layout:
            return 1
        return tensor(getattr(self, operand)).shape[layout.index(dim)]
