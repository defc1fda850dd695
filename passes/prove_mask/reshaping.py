"""Entries of the whole seen otherwise: dims expanded, added, merged, moved, repeated, padded."""

from __future__ import annotations

import sympy
import torch.fx as fx

from tsa_compile.passes.facts.names import arg, dims_of, op_name, source, tensor
from tsa_compile.passes.facts.sizes import size_expr
from tsa_compile.passes.prove_mask.element import Elements, Index, transfer
from tsa_compile.passes.prove_mask.formula import AtMostZero, Formula, both
from tsa_compile.passes.prove_mask.number import number
from tsa_compile.passes.prove_mask.values import Value, cast, select


@transfer("expand", "broadcast_to", "expand_as")
def _expand(elements: Elements, node: fx.Node, index: Index) -> Value | None:
    return elements.entry(source(node), elements.broadcast(source(node), index))


@transfer("unsqueeze")
def _unsqueeze(elements: Elements, node: fx.Node, index: Index) -> Value | None:
    dim = arg(node, 1, "dim") % len(index)
    return elements.entry(source(node), index[:dim] + index[dim + 1 :])


@transfer("view", "squeeze", "view_as", "reshape_as", "flatten")
def _view(elements: Elements, node: fx.Node, index: Index) -> Value | None:
    """A reshape that only adds or drops dimensions of size 1."""
    before, after = elements.shape(source(node)), elements.shape(node)
    if arg(node, 1, "dtype") is not None and not isinstance(arg(node, 1, "dtype"), (int, tuple, list, fx.Node)):
        return None  # view(dtype) reinterprets the bytes
    long_dims = [i for i, size in zip(index, after, strict=True) if size != 1]
    if [s for s in before if s != 1] != [s for s in after if s != 1]:
        return None
    left = iter(long_dims)
    return elements.entry(source(node), tuple(sympy.Integer(0) if s == 1 else next(left) for s in before))


@transfer("transpose")
def _transpose(elements: Elements, node: fx.Node, index: Index) -> Value | None:
    a, b = (arg(node, n, name) % len(index) for n, name in ((1, "dim0"), (2, "dim1")))
    order = list(index)
    order[a], order[b] = order[b], order[a]
    return elements.entry(source(node), tuple(order))


@transfer("t", "mT")
def _last_two(elements: Elements, node: fx.Node, index: Index) -> Value | None:
    return elements.entry(source(node), (*index[:-2], *reversed(index[-2:])))


@transfer("getattr")
def _attribute(elements: Elements, node: fx.Node, index: Index) -> Value | None:
    if node.args[1] in ("T", "mT") and len(index) == 2:
        return _last_two(elements, node, index)
    return _last_two(elements, node, index) if node.args[1] == "mT" else None


@transfer("permute")
def _permute(elements: Elements, node: fx.Node, index: Index) -> Value | None:
    before = list(index)
    for position, dim in enumerate(dims_of(node)):
        before[dim % len(index)] = index[position]
    return elements.entry(source(node), tuple(before))


@transfer("repeat")
def _repeat(elements: Elements, node: fx.Node, index: Index) -> Value | None:
    """Repetition of dimensions of size 1 only; the others once."""
    shape = elements.shape(source(node))
    kept = elements.shape(node)[len(index) - len(shape) :]
    if any(s not in (1, k) for s, k in zip(shape, kept, strict=True)):
        return None
    return elements.entry(source(node), elements.broadcast(source(node), index))


@transfer("pad", "constant_pad_nd")
def _pad(elements: Elements, node: fx.Node, index: Index) -> Value | None:
    """The source's entry inside, a constant outside."""
    padded, widths = source(node), arg(node, 1, "pad")
    named = op_name(node) == "pad"
    if (named and arg(node, 2, "mode", "constant") != "constant") or not isinstance(widths, (tuple, list)) or len(widths) % 2:
        return None
    fill, dtype = arg(node, 3 if named else 2, "value", 0), tensor(node).dtype
    outside = None if isinstance(fill, fx.Node) else cast(number(fill or 0), dtype)
    inside: Formula = True
    moved = list(index)
    for n, (before, after) in enumerate(zip(widths[::2], widths[1::2], strict=True)):
        first, last, dim = size_expr(before), size_expr(after), len(index) - 1 - n
        if dim < 0 or first is None or last is None or not (elements.non_negative(first) and elements.non_negative(last)):
            return None  # a negative width cuts
        moved[dim] = sympy.expand(index[dim] - first)
        end = moved[dim] - elements.shape(padded)[dim] + 1
        inside = both(inside, both(_settled(elements, -moved[dim]), _settled(elements, end)))
    return None if outside is None else select(inside, elements.entry(padded, tuple(moved)), outside, dtype)


def _settled(elements: Elements, expr: sympy.Expr) -> Formula:
    """`expr <= 0`"""
    return elements.settle(AtMostZero(sympy.expand(expr)))
