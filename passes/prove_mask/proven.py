"""What is proven about the mask of a site, in the graph's terms."""

from __future__ import annotations

import dataclasses

import torch.fx as fx

from tsa_compile.passes.prove_mask.source import MaskSource
from tsa_compile.passes.site import MaskFacts, Size


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
class HeadTerm:
    """Numbers of the graph, one for each head: the entries of `node` at `index`, of which None is the head's own."""

    node: fx.Node
    index: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class ProvenMask:
    """`MaskFacts` with the nodes behind them.

    Args:
        causal, window: as in `MaskFacts`.
        key_mask: terms that hide keys from all queries and heads of a batch row alike; all must allow a key.
        keys_used: how many leading keys any query sees, where fewer than `Lk` (a mask aligned to the top left, such as
            `is_causal` with `Lq < Lk`); None: all.
        rows: `start` (or None) and `lengths`, int32 `[B]`: each batch row's keys, of which the queries are the last; see
            `tsa::attach_rows`. None: all.
        unproven: why the mask is none of this; the other fields then say nothing.
        data: all that masks the scores, for policies that take masks as they are. Of a mask that is unproven alone.
    """

    causal: bool = False
    window: int | None = None
    key_mask: tuple[KeyTerm, ...] = ()
    keys_used: Size | None = None
    rows: tuple[fx.Node | None, fx.Node] | None = None
    unproven: str | None = None
    data: tuple[MaskSource, ...] | None = None

    @property
    def facts(self) -> MaskFacts:
        return MaskFacts(self.causal, self.window, bool(self.key_mask), None if self.data is None else self.unproven)
