"""Values of one tensor entry: numbers, booleans, and which of them by cases."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TypeAlias, TypeGuard

import torch

from tsa_compile.passes.prove_mask.formula import FORMULAS, Data, Formula, both, either, opposite
from tsa_compile.passes.prove_mask.number import Number, compare, number, to_float, to_integer

HIDDEN_BELOW = -1e4  # an additive mask of this or less hides a key: its weight is exp(-1e4) = 0 beside any visible one
_MAX_CASES = 16


@dataclasses.dataclass(frozen=True)
class Where:
    """`yes` where the condition holds, else `no`."""

    condition: Formula
    yes: Value
    no: Value


Value: TypeAlias = "Number | Where | Data | Formula"


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


def cast(value: Value, dtype: torch.dtype) -> Value | None:
    """The value in another dtype; None where that may round or wrap."""
    if dtype == torch.bool:
        return truth(value)
    if dtype.is_floating_point:
        return lift(to_float, value)
    return lift(lambda n: to_integer(n, dtype), value) if not dtype.is_complex else None


def truth(value: Value) -> Formula | None:
    """`value != 0` as a formula; None for run-time numbers."""
    if is_formula(value):
        return value
    result = lift(lambda n: compare("ne")(n, number(0)), value)
    return result if isinstance(result, FORMULAS) else None


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
