"""The entry: what do all masks of one attention, taken together, let a query see?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
import torch.fx as fx

from tsa_compile.passes.facts.graph_facts import GraphFacts
from tsa_compile.passes.facts.names import Unreadable, describe, tensor_of
from tsa_compile.passes.facts.sizes import known_size
from tsa_compile.passes.prove_mask import along_a_dim, constants, creation, indexing, pointwise, reshaping  # noqa: F401  (transfers)
from tsa_compile.passes.prove_mask.classify import Lengths, classify
from tsa_compile.passes.prove_mask.element import Elements, Index
from tsa_compile.passes.prove_mask.formula import BATCH, FORMULAS, HEAD, KEY, QUERY, AtMostZero, Data, Formula, both, opposite
from tsa_compile.passes.prove_mask.patterns import Constants
from tsa_compile.passes.prove_mask.proven import ProvenMask
from tsa_compile.passes.prove_mask.source import MaskSource
from tsa_compile.passes.prove_mask.values import HIDDEN_BELOW, Value, Where, visible
from tsa_compile.passes.site import Size


class MaskProver:
    """Proves masks of one graph. Sites that share masks share the work.

    Args:
        facts: what is known about the graph.
        known: tensors whose values are known, by node.
    """

    def __init__(self, facts: GraphFacts, known: Mapping[fx.Node, torch.Tensor] | None = None) -> None:
        self._facts = facts
        self.constants = Constants(known or {})
        self._elements: dict[tuple[sympy.Expr, ...], Elements] = {}
        self._proven: dict[tuple[Any, ...], ProvenMask] = {}

    def prove(self, sources: tuple[MaskSource, ...], shape: tuple[Size, Size, Size, Size], has_heads: bool = True) -> ProvenMask:
        """The facts about the conjunction of `sources`.

        Args:
            sources: all that masks the scores.
            shape: (batch, heads, q_len, k_len) of the scores.
            has_heads: the scores have a dimension of heads; False: `[batch, q_len, k_len]`.
        """
        key = (sources, tuple(known_size(s) for s in shape), has_heads)
        if key not in self._proven:
            self._proven[key] = self._prove(sources, shape, key[1], has_heads)
        return self._proven[key]

    def entry(self, node: fx.Node, shape: tuple[Size, Size, Size, Size], index: Index) -> Value:
        """What the entry of `node` at `index` is, of a graph whose scores have this shape."""
        return self._of_sizes(tuple(known_size(s) for s in shape)).entry(node, index)

    def hides(self, source: MaskSource, shape: tuple[Size, Size, Size, Size], has_heads: bool = True) -> bool:
        """Does what a source of kind "show" or "hide" puts in place of a score hide it? Arguments as of `prove`."""
        assert source.mask is not None
        try:
            _check_fill(self._of_sizes(tuple(known_size(s) for s in shape)), source, source.mask, _index(has_heads))
        except Unreadable:
            return False
        return True

    def _of_sizes(self, sizes: tuple[sympy.Expr, ...]) -> Elements:
        if sizes not in self._elements:
            bounds = dict(zip((BATCH, HEAD, QUERY, KEY), sizes, strict=True))
            self._elements[sizes] = Elements(self._facts.sizes, bounds, self._facts.written, self.constants)
        return self._elements[sizes]

    def _prove(
        self, sources: tuple[MaskSource, ...], shape: tuple[Size, ...], sizes: tuple[sympy.Expr, ...], has_heads: bool
    ) -> ProvenMask:
        index, elements = _index(has_heads), self._of_sizes(sizes)
        try:
            formula: Formula = True
            for source in sources:
                formula = both(formula, _visible_entry(elements, source, index))
            return classify(formula, Lengths(sizes[2], sizes[3], shape[2]), self._facts.sizes, self._facts.written)
        except Unreadable as why:
            return ProvenMask(unproven=str(why))


def _index(has_heads: bool) -> Index:
    """Of the scores."""
    return (BATCH, HEAD, QUERY, KEY) if has_heads else (BATCH, QUERY, KEY)


def _visible_entry(elements: Elements, source: MaskSource, index: Index) -> Formula:
    """The formula for: this source lets query `QUERY` see key `KEY`; `index` is that of the scores."""
    if source.kind == "causal":
        return elements.settle(AtMostZero(KEY - QUERY))
    mask = source.mask
    assert mask is not None
    if source.split is not None:
        raise Unreadable("scores are masked by batch and head, and were multiplied with both as one dimension")
    example = tensor_of(mask)
    if example is None or example.dim() > len(index):
        raise Unreadable(f"shape of mask {describe(mask)} is unknown or has more than {len(index)} dimensions")
    value = elements.entry(mask, elements.broadcast(mask, index))
    if source.kind == "add" or (source.kind == "mask" and example.dtype != torch.bool):
        return _additive(elements, value, mask, source.factor)
    if not isinstance(value, FORMULAS):
        raise Unreadable(f"mask {describe(mask)} is not boolean")
    if source.kind in ("show", "hide"):
        _check_fill(elements, source, mask, index)
    return opposite(value) if source.kind == "hide" else value


def _additive(elements: Elements, value: Value, mask: fx.Node, factor: float) -> Formula:
    formula = visible(value, factor)
    if formula is None:
        data = next((c.node for c in elements.cases(value) if isinstance(c, Data)), None)
        if data is not None:
            raise Unreadable(f"scores get a bias that is not a mask: {describe(data)}")
        cases = [c for c in elements.cases(value) if not isinstance(c, Where)]
        raise Unreadable(f"scores get a bias that neither leaves nor hides them: {describe(mask)}, {cases[:3]}")
    return formula


def _check_fill(elements: Elements, source: MaskSource, mask: fx.Node, index: Index) -> None:
    """What takes the place of a hidden score must hide it."""
    fill = elements.operand(source.fill, mask, index)
    if fill is None or visible(fill, source.factor) is not False:
        raise Unreadable(f"hidden scores are replaced by {source.fill}, which is not {HIDDEN_BELOW} or less")
