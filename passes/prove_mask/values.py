"""Numeric values of one tensor entry, and arithmetic on them that is exact or gives up."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TypeAlias, TypeGuard

import sympy
import torch

from tsa_compile.passes.prove_mask.formula import (
    FORMULAS,
    AtMostZero,
    Data,
    Formula,
    IsZero,
    both,
    either,
    opposite,
)

HIDDEN_BELOW = -1e4  # an additive mask of this or less hides a key: its weight is exp(-1e4) = 0 beside any visible one
_MAX_CASES = 16
_INT32_FACTOR, _INT32_REST = 4, 2**30  # index arithmetic in int32 is exact within these, for lengths below 2**28


@dataclasses.dataclass(frozen=True)
class Number:
    """An integer expression in sizes and indices, or a constant float."""

    value: sympy.Expr | float

    @property
    def constant(self) -> int | float | None:
        """The Python number, or None if it depends on an index or a size."""
        if isinstance(self.value, float):
            return self.value
        return int(self.value) if self.value.is_Integer else None


@dataclasses.dataclass(frozen=True)
class Where:
    """`yes` where the condition holds, else `no`."""

    condition: Formula
    yes: Value
    no: Value


Value: TypeAlias = "Number | Where | Data | Formula"


def number(x: int | float | sympy.Expr) -> Number:
    return Number(x if isinstance(x, float) else sympy.Integer(x) if isinstance(x, int) else sympy.expand(x))


def is_formula(value: Value | None) -> TypeGuard[Formula]:
    return isinstance(value, FORMULAS) and not isinstance(value, Data)


def as_numeric(value: Value) -> Value:
    """Booleans as 0 and 1."""
    if isinstance(value, bool):
        return number(int(value))
    return Where(value, number(1), number(0)) if is_formula(value) else value


def lift(op: Callable[..., Value | None], *values: Value) -> Value | None:
    """Apply `op` to every case of its operands; None as soon as a case has none or there are too many cases."""
    cases = [_MAX_CASES]

    def go(done: tuple[Number, ...], left: tuple[Value, ...]) -> Value | None:
        if not left:
            return op(*done)
        head, rest = as_numeric(left[0]), left[1:]
        if isinstance(head, Number):
            return go((*done, head), rest)
        if not isinstance(head, Where):
            return None
        cases[0] -= 1
        if cases[0] < 0:
            return None
        yes, no = go(done, (head.yes, *rest)), go(done, (head.no, *rest))
        if yes is None or no is None:
            return None
        if isinstance(yes, FORMULAS) and isinstance(no, FORMULAS):  # Data among them: `op` gives no run-time numbers
            return choose_formula(head.condition, yes, no)
        return choose(head.condition, yes, no)

    return go((), values)


def choose_formula(condition: Formula, yes: Formula, no: Formula) -> Formula:
    """`where(condition, yes, no)` of booleans, run-time ones included."""
    return either(both(condition, yes), both(opposite(condition), no))


def choose(condition: Formula, yes: Value, no: Value) -> Value | None:
    """`where(condition, yes, no)`, simplified; None where a formula meets a run-time number."""
    if isinstance(condition, bool):
        return yes if condition else no
    if yes == no:
        return yes
    if is_formula(yes) and is_formula(no):
        return choose_formula(condition, yes, no)
    if is_formula(yes) or is_formula(no):
        yes, no = as_numeric(yes), as_numeric(no)
    return Where(condition, yes, no)


def select(condition: Formula, yes: Value, no: Value, dtype: torch.dtype) -> Value | None:
    """`choose` for a result of `dtype`; run-time booleans are formulas."""
    if dtype == torch.bool:
        if not (isinstance(yes, FORMULAS) and isinstance(no, FORMULAS)):
            return None
        return choose_formula(condition, yes, no)
    return choose(condition, yes, no)


def arithmetic(name: str) -> Callable[[Number, Number], Number | None]:
    """add, sub and mul: exact for integers; for floats only between constants."""
    ops = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b}

    def apply(a: Number, b: Number) -> Number | None:
        if isinstance(a.value, float) or isinstance(b.value, float):
            x, y = a.constant, b.constant
            return None if x is None or y is None else Number(float(ops[name](x, y)))
        return number(ops[name](a.value, b.value))

    return apply


def divide(a: Number, b: Number) -> Number | None:
    """True division, of constants."""
    x, y = a.constant, b.constant
    return None if x is None or not y or not math.isfinite(y) else Number(float(x) / y)


def cast(value: Value, dtype: torch.dtype) -> Value | None:
    """The value in another dtype; None where that may round or wrap."""
    if dtype == torch.bool:
        return truth(value)
    if dtype.is_floating_point:
        return lift(_to_float, value)
    return lift(lambda n: _to_integer(n, dtype), value) if not dtype.is_complex else None


def _to_float(n: Number) -> Number | None:
    c = n.constant
    if c is None or (isinstance(c, int) and abs(c) > 256):  # up to 256: exact even in bfloat16
        return None
    return Number(float(c))


def _to_integer(n: Number, dtype: torch.dtype) -> Number | None:
    c = n.constant
    if c is not None:
        if not math.isfinite(c) or not torch.iinfo(dtype).min <= int(c) <= torch.iinfo(dtype).max:
            return None
        return number(int(c))
    return n if fits(n, dtype) else None


def fits(n: Number, dtype: torch.dtype) -> bool:
    """Can an entry of `dtype` hold `n` exactly for every index?"""
    c = n.constant
    if c is not None:
        return dtype.is_floating_point or torch.iinfo(dtype).min <= c <= torch.iinfo(dtype).max
    if dtype == torch.int64:
        return True
    if dtype != torch.int32 or isinstance(n.value, float):
        return False
    terms = n.value.as_coefficients_dict()
    return all(
        abs(factor) <= (_INT32_REST if term == 1 else _INT32_FACTOR) and (term == 1 or term.is_Symbol)
        for term, factor in terms.items()
    )


def truth(value: Value) -> Formula | None:
    """`value != 0` as a formula; None for run-time numbers."""
    if is_formula(value):
        return value
    result = lift(lambda n: compare("ne")(n, number(0)), value)
    return result if isinstance(result, FORMULAS) else None


def compare(name: str) -> Callable[[Number, Number], Formula | None]:
    """eq, ne, lt, le, gt, ge: on integers as atoms, on constants decided."""

    def apply(a: Number, b: Number) -> Formula | None:
        x, y = a.constant, b.constant
        if x is not None and y is not None:
            return {"eq": x == y, "ne": x != y, "lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y}[name]
        if isinstance(a.value, float) or isinstance(b.value, float):
            return None
        d = sympy.expand(a.value - b.value)
        if d.is_Integer:
            return compare(name)(Number(d), number(0))
        if name in ("eq", "ne"):
            return IsZero(d, negated=name == "ne")
        return AtMostZero({"le": d, "lt": d + 1, "ge": -d, "gt": 1 - d}[name])

    return apply


def visible(value: Value, factor: float = 1.0) -> Formula | None:
    """Where adding `factor * value` leaves a score; elsewhere it must hide the key. None: that cannot be shown."""

    def decide(n: Number) -> Formula | None:
        c = n.constant
        if c is None or math.isnan(c):
            return None
        if c == 0:
            return True
        return False if c * factor <= HIDDEN_BELOW else None

    result = lift(decide, value)
    return result if isinstance(result, FORMULAS) else None
