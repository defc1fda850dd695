"""The leaf types of the passes: what is proven about a mask, and one place where a graph attends."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.fx as fx


@dataclasses.dataclass(frozen=True)
class KeyMask:
    """A bool node that varies along keys (and batch) only: true where the key may be read."""

    node: fx.Node
    key_dim: int  # dim of the node, from the end
    batch_dim: int | None


@dataclasses.dataclass(frozen=True)
class MaskFacts:
    """Which keys a query may read, proven for every size the graph accepts.

    Args:
        causal: a query reads no key after its own position.
        offset: None: queries are the last positions. An int: query i has position i + offset, and the keys from
            `Lq + offset` on (a static cache's empty part) are read by no query.
        window: a query reads only this many keys up to its own; None: all of them.
        key_masks: conditions on the key alone, such as padding; all must hold.
        unproven: why nothing above can be relied on; None if all of it is proven.
    """

    causal: bool = False
    offset: int | None = None
    window: int | None = None
    key_masks: tuple[KeyMask, ...] = ()
    unproven: str | None = None


@dataclasses.dataclass(frozen=True)
class AttentionSite:
    """One attention of a graph: `softmax(scale * q k^T + mask) v`.

    Args:
        node: the node whose result is the attention's output, `[B, H, Lq, Dv]`.
        form: how the graph writes it: "sdpa" or "manual".
        q, k, v: nodes of the operands; k and v with the model's own KV heads, before any repetition.
        scale: factor of the scores.
        mask: what is proven about the mask.
        obstacle: why no policy may replace the site; None if one may.
        index: the site's number in its graph.
        module: path of the module that attends, such as "model.layers.3.self_attn"; "" if the graph does not say.
        layer: the first number in that path, else `index`.
    """

    node: fx.Node
    form: str
    q: fx.Node
    k: fx.Node
    v: fx.Node
    scale: float
    mask: MaskFacts
    obstacle: str | None
    index: int
    module: str
    layer: int

    def _shape(self, node: fx.Node) -> Any:
        return node.meta.get("example_value", node.meta.get("val")).shape

    @property
    def batch(self) -> Any:
        return self._shape(self.q)[0]

    @property
    def heads(self) -> Any:
        return self._shape(self.q)[1]

    @property
    def kv_heads(self) -> Any:
        return self._shape(self.k)[1]

    @property
    def q_len(self) -> Any:
        return self._shape(self.q)[2]

    @property
    def k_len(self) -> Any:
        return self._shape(self.k)[2]

    @property
    def head_dim(self) -> Any:
        return self._shape(self.q)[3]
