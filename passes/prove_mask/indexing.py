"""Entries of parts: slices, selected places, subscripts and look-ups."""

from __future__ import annotations

from typing import Any as Anything

import sympy
import torch.fx as fx

from tsa_compile.passes.facts.names import arg, source, tensor, tensor_of
from tsa_compile.passes.facts.sizes import size_expr
from tsa_compile.passes.prove_mask.element import Elements, Index, transfer
from tsa_compile.passes.prove_mask.number import Number
from tsa_compile.passes.prove_mask.values import Value


@transfer("slice")
def _slice(elements: Elements, node: fx.Node, index: Index) -> Value | None:
    dim = elements.dim(node, arg(node, 1, "dim", 0))
    return _slice_of(elements, node, index, dim, arg(node, 2, "start"), arg(node, 4, "step", 1))


@transfer("narrow")
def _narrow(elements: Elements, node: fx.Node, index: Index) -> Value | None:
    dim = elements.dim(node, arg(node, 1, "dim"))
    return _slice_of(elements, node, index, dim, arg(node, 2, "start"), 1)


def _slice_of(elements: Elements, node: fx.Node, index: Index, dim: int, start: Anything, step: Anything) -> Value | None:
    whole = source(node)
    moved = _sliced(elements, elements.shape(whole)[dim], index[dim], start, step)
    return None if moved is None else elements.entry(whole, (*index[:dim], moved, *index[dim + 1 :]))


@transfer("select")
def _select(elements: Elements, node: fx.Node, index: Index) -> Value | None:
    whole = source(node)
    dim = elements.dim(whole, arg(node, 1, "dim"))
    place = _absolute(elements, size_expr(arg(node, 2, "index")), elements.shape(whole)[dim])
    return None if place is None else elements.entry(whole, (*index[:dim], place, *index[dim:]))


def _sliced(elements: Elements, length: sympy.Expr, i: sympy.Expr, start: Anything, step: Anything) -> sympy.Expr | None:
    """The source index of entry `i` of a slice; the end plays no part, since `i` is inside the slice."""
    first = sympy.Integer(0) if start is None else size_expr(start)
    stride = sympy.Integer(1) if step is None else size_expr(step)
    if first is None or stride is None or not stride.is_Integer or stride < 1:
        return None
    never_positive = elements.sizes.at_most_zero
    if never_positive(first + 1):  # counts from the end
        first = sympy.Integer(0) if never_positive(length + first) else length + first
    return sympy.expand(first + stride * i) if never_positive(-first) else None


def _absolute(elements: Elements, place: sympy.Expr | None, size: sympy.Expr) -> sympy.Expr | None:
    """A position that may be given from the end, as one from the start."""
    if place is None:
        return None
    if place.is_Integer and place < 0:
        place = size + place
    return place if elements.non_negative(place) else None


@transfer("getitem", "index")
def _getitem(elements: Elements, node: fx.Node, index: Index) -> Value | None:
    whole = source(node)
    if tensor_of(whole) is None:
        return None  # an item of a tuple
    keys: list[Anything] = [*node.args[1]] if isinstance(node.args[1], (tuple, list)) else [node.args[1]]
    if node.op == "call_function" and not _is_python(node):
        keys = [slice(None) if k is None else k for k in keys]  # aten.index: None means all
    return _Subscript(elements, whole).entry(keys, index)


def _is_python(node: fx.Node) -> bool:
    return getattr(node.target, "__module__", "") == "_operator"


class _Subscript:
    """`source[keys]`: ints, slices, None, ..., and index tensors."""

    def __init__(self, elements: Elements, source: fx.Node) -> None:
        self.elements, self.source = elements, source
        self.shape = elements.shape(source)

    def entry(self, keys: list[Anything], index: Index) -> Value | None:
        keys = self._without_ellipsis(keys)
        advanced = [n for n, k in enumerate(keys) if _is_tensor(k)]
        if any(str(tensor(keys[n]).dtype) in ("torch.bool", "torch.uint8") for n in advanced):
            return None
        if advanced and any(size_expr(k) is not None for k in keys):
            return None  # an int among index tensors counts as one of them
        rank = max((tensor(keys[n]).dim() for n in advanced), default=0)
        together = advanced == list(range(advanced[0], advanced[-1] + 1)) if advanced else True
        place = self._advanced_start(keys, advanced) if together else 0
        lookup, rest = index[place : place + rank], index[:place] + index[place + rank :]
        return self._walk(keys, lookup, list(rest))

    def _without_ellipsis(self, keys: list[Anything]) -> list[Anything]:
        used = sum(1 for k in keys if k is not None and k is not Ellipsis)
        missing = [slice(None)] * (len(self.shape) - used)
        if not any(k is Ellipsis for k in keys):
            return keys + missing
        at = next(n for n, k in enumerate(keys) if k is Ellipsis)
        return keys[:at] + missing + keys[at + 1 :]

    @staticmethod
    def _advanced_start(keys: list[Anything], advanced: list[int]) -> int:
        """The result dimension where the index tensors' dimensions begin."""
        return sum(1 for k in keys[: advanced[0]] if k is None or isinstance(k, slice)) if advanced else 0

    def _walk(self, keys: list[Anything], lookup: Index, rest: list[sympy.Expr]) -> Value | None:
        source_index: list[sympy.Expr] = []
        for key in keys:
            if key is None:
                rest.pop(0)
                continue
            dim = len(source_index)
            if isinstance(key, slice):
                moved = _sliced(self.elements, self.shape[dim], rest.pop(0), key.start, key.step)
            elif _is_tensor(key):
                moved = self._looked_up(key, lookup, dim)
            else:
                moved = _absolute(self.elements, size_expr(key), self.shape[dim])
            if moved is None:
                return None
            source_index.append(moved)
        return self.elements.entry(self.source, tuple(source_index))

    def _looked_up(self, key: fx.Node, lookup: Index, dim: int) -> sympy.Expr | None:
        value = self.elements.entry(key, self.elements.broadcast(key, lookup))
        if not isinstance(value, Number) or isinstance(value.value, float):
            return None
        return _absolute(self.elements, value.value, self.shape[dim])


def _is_tensor(key: Anything) -> bool:
    return isinstance(key, fx.Node) and tensor_of(key) is not None
