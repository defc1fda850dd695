"""Entries of elementwise operations: arithmetic, comparison, logic, selection, casts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any as Anything

import torch
import torch.fx as fx

from tsa_compile.passes.facts.names import SAME_VALUE, arg, tensor
from tsa_compile.passes.prove_mask.element import Elements, Index, Transfer, transfer
from tsa_compile.passes.prove_mask.formula import Data, Formula, both, either, opposite
from tsa_compile.passes.prove_mask.number import Number, arithmetic, compare, divide, number
from tsa_compile.passes.prove_mask.values import Value, cast, is_formula, lift, select


def _cast_to(node: fx.Node, value: Value | None) -> Value | None:
    return None if value is None else cast(value, tensor(node).dtype)


def _binary(op: Callable[[Number, Number], Value | None], swap: bool = False) -> Transfer:
    def fn(elements: Elements, node: fx.Node, index: Index) -> Value | None:
        if len(node.args) < 2 or node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode") is not None:
            return None
        if len(node.args) > 2 and node.args[2] != 1:  # rsub.Scalar's alpha
            return None
        a, b = (elements.operand(x, node, index) for x in node.args[:2])
        if a is None or b is None:
            return None
        return _cast_to(node, lift(op, b, a) if swap else lift(op, a, b))

    return fn


transfer("add")(_binary(arithmetic("add")))
transfer("sub")(_binary(arithmetic("sub")))
transfer("rsub")(_binary(arithmetic("sub"), swap=True))
transfer("div")(_binary(divide))


@transfer("mul")
def _mul(elements: Elements, node: fx.Node, index: Index) -> Value | None:
    if tensor(node).dtype == torch.bool:
        return _logic(both)(elements, node, index)
    return _binary(arithmetic("mul"))(elements, node, index)


@transfer("neg")
def _neg(elements: Elements, node: fx.Node, index: Index) -> Value | None:
    value = elements.operand(node.args[0], node, index)
    return None if value is None else _cast_to(node, lift(arithmetic("sub"), number(0), value))


def _comparison(name: str) -> Transfer:
    def fn(elements: Elements, node: fx.Node, index: Index) -> Value | None:
        a, b = (elements.operand(x, node, index) for x in node.args[:2])
        if a is None or b is None:
            return None

        def decided(x: Number, y: Number) -> Formula | None:
            formula = compare(name)(x, y)
            return None if formula is None else elements.settle(formula)

        return lift(decided, a, b)

    return fn


for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    transfer(_name)(_comparison(_name))


def _formula(elements: Elements, x: Anything, node: fx.Node, index: Index) -> Formula | None:
    """A bool operand as a formula; run-time booleans are atoms."""
    value = elements.operand(x, node, index)
    if isinstance(value, Data):
        return value if tensor(value.node).dtype == torch.bool else None
    return value if is_formula(value) else None


def _logic(op: Callable[[Formula, Formula], Formula]) -> Transfer:
    def fn(elements: Elements, node: fx.Node, index: Index) -> Value | None:
        a, b = (_formula(elements, x, node, index) for x in node.args[:2])
        return None if a is None or b is None else op(a, b)

    return fn


transfer("and")(_logic(both))
transfer("or")(_logic(either))


@transfer("not")
def _not(elements: Elements, node: fx.Node, index: Index) -> Value | None:
    a = _formula(elements, node.args[0], node, index)
    return None if a is None else elements.settle(opposite(a))


@transfer("where")
def _where(elements: Elements, node: fx.Node, index: Index) -> Value | None:
    if len(node.args) != 3:
        return None
    operands = (node.args[1], node.args[0], node.args[2]) if _is_method(node) else node.args
    return _select(elements, node, index, *operands)


@transfer("masked_fill")
def _masked_fill(elements: Elements, node: fx.Node, index: Index) -> Value | None:
    return _select(elements, node, index, arg(node, 1, "mask"), arg(node, 2, "value"), node.args[0])


def _is_method(node: fx.Node) -> bool:
    return node.op == "call_method"


def _select(elements: Elements, node: fx.Node, index: Index, condition: Anything, yes: Anything, no: Anything) -> Value | None:
    c = _formula(elements, condition, node, index)
    dtype = tensor(node).dtype
    branches = (elements.operand(x, node, index) for x in (yes, no))
    y, n = (b if b is None or isinstance(b, Data) else cast(b, dtype) for b in branches)
    return None if c is None or y is None or n is None else select(c, y, n, dtype)


@transfer("to", "type_as")
def _to(elements: Elements, node: fx.Node, index: Index) -> Value | None:
    value = elements.operand(node.args[0], node, index)
    if isinstance(value, Data):
        same = tensor(value.node).dtype == tensor(node).dtype
        return value if same else None
    return _cast_to(node, value)


@transfer(*SAME_VALUE)
def _same(elements: Elements, node: fx.Node, index: Index) -> Value | None:
    return elements.operand(node.args[0], node, index)
