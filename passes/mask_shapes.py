"""Transfer functions of operations that move dims: views, expansions, slices, gathers by position."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import sympy
import torch.fx as fx

from tsa_compile.passes import mask_values as mv
from tsa_compile.passes.graph_names import argument, expression, is_tensor, is_zero, shape_of
from tsa_compile.passes.mask_values import Affine, Data, Value

if TYPE_CHECKING:
    from tsa_compile.passes.mask_transfer import MaskReader


def _expand(reader: MaskReader, node: fx.Node) -> Value | None:
    return reader.value(node.args[0])  # dims are counted from the end: an expanded dim is one nothing varies along


def _reshape(reader: MaskReader, node: fx.Node) -> Value | None:
    """Only where dims of size 1 come or go: the others keep their order."""
    before, after = shape_of(node.args[0]), shape_of(node)
    old = [i - len(before) for i, n in enumerate(before) if n != 1]
    new = [i - len(after) for i, n in enumerate(after) if n != 1]
    if len(old) != len(new) or not all(is_zero(before[a] - after[b]) for a, b in zip(old, new, strict=True)):
        return None
    return mv.remap(reader.value(node.args[0]), dict(zip(old, new, strict=True)).get)


def _permuted(reader: MaskReader, node: fx.Node, order: list[int]) -> Value | None:
    """order[new] = old, both from the start."""
    rank = len(order)
    move = {old - rank: new - rank for new, old in enumerate(order)}
    return mv.remap(reader.value(node.args[0]), move.get)


def _transpose(reader: MaskReader, node: fx.Node) -> Value | None:
    rank = len(shape_of(node))
    a, b = (argument(node, i, n, i - 1) for i, n in ((1, "dim0"), (2, "dim1")))
    order = list(range(rank))
    order[a], order[b] = order[b], order[a]
    return _permuted(reader, node, order)


def _permute(reader: MaskReader, node: fx.Node) -> Value | None:
    dims = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (list, tuple)) else node.args[1:]
    return _permuted(reader, node, [d % len(dims) for d in dims])


def _sliced(value: Value | None, dim: int, start: Any, size: sympy.Expr, same: bool) -> Value | None:
    """x[start:...] along `dim`; `same`: nothing is cut off."""
    if value is None or same:
        return value
    if not isinstance(start, sympy.Expr):
        return None
    if start.is_number and start < 0:
        start = start + size
    elif not start.is_number and dim in value.dims:
        from tsa_compile.passes.graph_names import not_negative

        if not not_negative(start):
            return None
    return mv.shift(value, dim, start, size, keep=True)


def _slice(reader: MaskReader, node: fx.Node) -> Value | None:
    """aten.slice(x, dim, start, end, step)."""
    x, dim, step = node.args[0], argument(node, 1, "dim", 0), argument(node, 4, "step", 1)
    if step != 1:
        return None
    before, after = shape_of(x), shape_of(node)
    dim = dim - len(before) if dim >= 0 else dim
    start = expression(argument(node, 2, "start") or 0)
    return _sliced(reader.value(x), dim, start, before[dim], is_zero(before[dim] - after[dim]))


def _getitem(reader: MaskReader, node: fx.Node) -> Value | None:
    """Basic indexing (slices, None, ints, ...), or gathering by index tensors alone."""
    x, index = node.args[:2]
    if not is_tensor(x):
        return None
    index = index if isinstance(index, tuple) else (index,)
    if all(is_tensor(i) for i in index) and len(index) == len(shape_of(x)):
        return _gather(reader, node, x, index)
    if any(is_tensor(i) for i in index):
        return None
    return _basic_index(reader, node, x, index)


def _basic_index(reader: MaskReader, node: fx.Node, x: fx.Node, index: tuple[Any, ...]) -> Value | None:
    value, before, after = reader.value(x), shape_of(x), shape_of(node)
    used = sum(i is not None and i is not Ellipsis for i in index)
    if Ellipsis not in index:
        index = (*index, Ellipsis)
    at, out, move = 0, 0, {}
    for i in index:
        if i is None:
            out += 1
        elif i is Ellipsis:
            for _ in range(len(before) - used):
                move[at - len(before)] = out - len(after)
                at, out = at + 1, out + 1
        elif isinstance(i, slice):
            dim = at - len(before)
            if i.step not in (None, 1):
                return None
            start = expression(i.start if i.start is not None else 0)
            value = _sliced(value, dim, start, before[dim], is_zero(before[dim] - after[out]))
            move[dim] = out - len(after)
            at, out = at + 1, out + 1
        else:
            start = expression(i)
            if start is None or value is None:
                return None
            start = start + before[at] if start.is_number and start < 0 else start
            value = mv.shift(value, at - len(before), start, before[at], keep=False)
            at += 1
    return None if value is None else mv.remap(value, move.get)


def _gather(reader: MaskReader, node: fx.Node, x: fx.Node, index: tuple[Any, ...]) -> Value | None:
    """x[i0, i1, ...] with an index tensor for each dim: x is read at those places."""
    places = [reader.value(i) for i in index]
    rank, value = len(index), reader.value(x)
    if isinstance(value, Affine):
        total = mv.constant(value.const)
        for d, c in value.terms:
            place = places[d + rank]
            if not isinstance(place, Affine):
                return None
            total = total.plus(place, c)
        return total
    if value is not None and not value.dims:
        return value
    varying = frozenset().union(*(places[d + rank].dims for d in value.dims)) if value is not None else frozenset()
    return Data(node, tuple(sorted((d, d) for d in varying)))


def _index(reader: MaskReader, node: fx.Node) -> Value | None:
    """aten.index(x, [i0, i1, ...])."""
    x, index = node.args[0], tuple(node.args[1])
    if len(index) == len(shape_of(x)) and all(is_tensor(i) for i in index):
        return _gather(reader, node, x, index)
    return None


def _select(reader: MaskReader, node: fx.Node) -> Value | None:
    """aten.select(x, dim, index)."""
    x, dim, at = node.args[:3]
    before = shape_of(x)
    dim = dim - len(before) if dim >= 0 else dim
    start = expression(at)
    if start is None or not start.is_number:
        return None
    value = mv.shift(reader.value(x), dim, start + before[dim] if start < 0 else start, before[dim], keep=False)
    return None if value is None else mv.remap(value, lambda d: d if d > dim else d + 1)


def _squeeze(reader: MaskReader, node: fx.Node) -> Value | None:
    return _reshape(reader, node)


SHAPE_RULES: dict[str, Callable[[MaskReader, fx.Node], Value | None]] = {
    "expand": _expand,
    "reshape": _reshape,
    "unsqueeze": _reshape,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "permute": _permute,
    "slice": _slice,
    "getitem": _getitem,
    "index": _index,
    "select": _select,
}

