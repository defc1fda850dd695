"""What the passes know about one attention: where it is, what it reads, what its mask was proven to be."""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

import torch
import torch.fx as fx

Size: TypeAlias = int | torch.SymInt

PHASES = ("prefill", "decode", "verify", "draft", "denoise_first", "denoise")


@dataclasses.dataclass(frozen=True)
class KeyTerm:
    """A bool tensor of the graph that hides keys, and where its entry for batch row `b` and key `j` is found.

    Args:
        node: the bool tensor; true means visible, unless `negated`.
        axes: where to look along each of its dimensions: `("batch", c)` at `b + c`, `("key", c)` at `j + c`,
            `("fixed", c)` at `c`.
        negated: true means hidden.
    """

    node: fx.Node
    axes: tuple[tuple[str, int], ...]
    negated: bool = False


@dataclasses.dataclass(frozen=True)
class MaskFacts:
    """What was proven about a mask: query `i` sees key `j` if and only if all of the facts allow it.

    Args:
        causal: only keys up to the query's own position, the queries being the last `Lq` of the keys in use:
            `j <= i + K - Lq`, where `K` is `keys_used` or else `Lk`.
        window: with `causal`, only the last `window` of these keys, the own position included.
        key_mask: terms that hide keys from all queries and heads of a batch row alike; all must allow a key.
        keys_used: how many leading keys any query sees, where fewer than `Lk` (a mask aligned to the top left, such as
            `is_causal` with `Lq < Lk`); None: all.
        unproven: why the mask is none of this; the other fields then say nothing.
    """

    causal: bool = False
    window: int | None = None
    key_mask: tuple[KeyTerm, ...] = ()
    keys_used: Size | None = None
    unproven: str | None = None

    @property
    def kind(self) -> str:
        """ "causal", "sliding window" or "bidirectional"; a key mask may come with each."""
        if not self.causal:
            return "bidirectional"
        return "causal" if self.window is None else "sliding window"


@dataclasses.dataclass(frozen=True)
class Layouts:
    """The order of dimensions of a site's tensors: b batch, h heads, l length, d head dim.

    Where none has an "h" (rank 3), each entry of the batch is one head, or batch and heads are one dimension.
    """

    q: str = "bhld"
    k: str = "bhld"
    v: str = "bhld"
    out: str = "bhld"


BHLD = Layouts()


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionSite:
    """One attention of a traced graph: `node = softmax(scale * q k^T + mask) v`.

    Args:
        node: the output; a rewrite replaces it.
        form: "sdpa", "manual" or "flex".
        q, k, v: the tensors read. K and V have their own head count: repetition for grouped queries is seen through.
        scale: factor of the scores.
        mask: what was proven about the mask.
        obstacle: why no policy may touch this site, or None.
        index: its place among the sites of the graph.
        module: path of the module that computes it, such as "model.layers.3.self_attn"; "" if unknown.
        layer: the first number in `module`, or else `index`.
        layouts: the order of dimensions of q, k, v and the output.
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
    layouts: Layouts = BHLD

    @property
    def batch(self) -> Size:
        return self._size(self.q, self.layouts.q, "b")

    @property
    def heads(self) -> Size:
        return self._size(self.q, self.layouts.q, "h")

    @property
    def q_len(self) -> Size:
        return self._size(self.q, self.layouts.q, "l")

    @property
    def head_dim(self) -> Size:
        return self._size(self.q, self.layouts.q, "d")

    @property
    def kv_heads(self) -> Size:
        return self._size(self.k, self.layouts.k, "h")

    @property
    def k_len(self) -> Size:
        return self._size(self.k, self.layouts.k, "l")

    @staticmethod
    def _size(node: fx.Node, layout: str, dim: str) -> Size:
        if dim not in layout:
            return 1
        value = node.meta.get("val", node.meta.get("example_value"))
        return value.shape[layout.index(dim)]  # type: ignore[union-attr]
