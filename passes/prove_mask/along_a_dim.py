"""Entries of operations along a dimension: cumsum and diff."""

from __future__ import annotations

import sympy
import torch.fx as fx

from tsa_compile.passes.facts.names import arg, source, tensor
from tsa_compile.passes.prove_mask.element import Elements, Index, transfer
from tsa_compile.passes.prove_mask.number import Number, arithmetic, number
from tsa_compile.passes.prove_mask.values import Value, as_numeric, cast, lift


def _at(index: Index, dim: int, i: sympy.Expr) -> Index:
    return (*index[:dim], sympy.sympify(i), *index[dim + 1 :])


@transfer("cumsum")
def _cumsum(elements: Elements, node: fx.Node, index: Index) -> Value | None:
    """Sums of entries that do not depend on the dimension."""
    summed = source(node)
    dim = elements.dim(node, arg(node, 1, "dim"))
    running = elements.fresh(elements.shape(summed)[dim])
    term = as_numeric(elements.entry(summed, _at(index, dim, running)))
    if not isinstance(term, Number) or isinstance(term.value, float) or running in term.value.free_symbols:
        return None
    return cast(number(term.value * (index[dim] + 1)), tensor(node).dtype)


@transfer("diff")
def _diff(elements: Elements, node: fx.Node, index: Index) -> Value | None:
    """First differences that are the same at every place, the first one (with `prepend`) included."""
    terms, prepend = source(node), arg(node, 3, "prepend")
    if arg(node, 1, "n", 1) != 1 or arg(node, 4, "append") is not None:
        return None
    dim = elements.dim(node, arg(node, 2, "dim", -1))
    i = index[dim]
    later = (i, i - 1) if prepend is not None else (i + 1, i)
    step = _difference(elements, terms, _at(index, dim, later[0]), terms, _at(index, dim, later[1]))
    if prepend is None or step is None:
        return step
    if not isinstance(prepend, fx.Node) or elements.shape(prepend)[dim] != 1:
        return None
    first = _difference(elements, terms, _at(index, dim, 0), prepend, _at(index, dim, 0))
    return step if first == step else None


def _difference(elements: Elements, a: fx.Node, a_index: Index, b: fx.Node, b_index: Index) -> Number | None:
    values = elements.entry(a, a_index), elements.entry(b, b_index)
    result = lift(arithmetic("sub"), *values)
    return result if isinstance(result, Number) else None
