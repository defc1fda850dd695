"""A number in one tensor entry, and arithmetic on such numbers that is exact or gives up (None)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import sympy
import torch

from tsa_compile.passes.prove_mask.formula import AtMostZero, Formula, IsZero

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


def number(x: int | float | sympy.Expr) -> Number:
    return Number(x if isinstance(x, float) else sympy.Integer(x) if isinstance(x, int) else sympy.expand(x))


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


def to_float(n: Number) -> Number | None:
    c = n.constant
    if c is None or (isinstance(c, int) and abs(c) > 256):  # up to 256: exact even in bfloat16
        return None
    return Number(float(c))


def to_integer(n: Number, dtype: torch.dtype) -> Number | None:
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
