"""Boolean formulas about one mask entry: what must hold of query, key, head and batch index for it to be true.

A formula is a Python bool, an atom or a combination of atoms. Index symbols are non-negative integers.
"""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

import sympy
import torch.fx as fx

BATCH, HEAD, QUERY, KEY = (sympy.Symbol(n, integer=True, nonnegative=True) for n in ("batch", "head", "query", "key"))


@dataclasses.dataclass(frozen=True)
class AtMostZero:
    """`expr <= 0`"""

    expr: sympy.Expr


@dataclasses.dataclass(frozen=True)
class IsZero:
    """`expr == 0`, or `expr != 0` if negated"""

    expr: sympy.Expr
    negated: bool = False


@dataclasses.dataclass(frozen=True)
class Data:
    """The entry of `node` at `index`, only known at run time. As a formula: that it is true (false, if negated)."""

    node: fx.Node
    index: tuple[sympy.Expr, ...]
    negated: bool = False


@dataclasses.dataclass(frozen=True)
class All:
    parts: frozenset[Formula]


@dataclasses.dataclass(frozen=True)
class Any:
    parts: frozenset[Formula]


Formula: TypeAlias = "bool | AtMostZero | IsZero | Data | All | Any"
FORMULAS = (bool, AtMostZero, IsZero, Data, All, Any)


def both(a: Formula, b: Formula) -> Formula:
    """a and b"""
    return _join(All, a, b, absorbing=False)


def either(a: Formula, b: Formula) -> Formula:
    """a or b"""
    return _join(Any, a, b, absorbing=True)


def _join(kind: type[All] | type[Any], a: Formula, b: Formula, absorbing: bool) -> Formula:
    parts: set[Formula] = set()
    for x in (a, b):
        if isinstance(x, bool):
            if x == absorbing:
                return absorbing
        else:
            parts |= x.parts if isinstance(x, kind) else {x}
    if any(opposite(x) in parts for x in parts):
        return absorbing
    if len(parts) <= 1:
        return parts.pop() if parts else not absorbing
    return kind(frozenset(parts))


def opposite(f: Formula) -> Formula:
    """not f"""
    if isinstance(f, bool):
        return not f
    if isinstance(f, AtMostZero):
        return AtMostZero(sympy.expand(1 - f.expr))  # integers: x > 0 is 1 - x <= 0
    if isinstance(f, (IsZero, Data)):
        return dataclasses.replace(f, negated=not f.negated)
    kind = Any if isinstance(f, All) else All
    return kind(frozenset(opposite(p) for p in f.parts))


def conjuncts(f: Formula) -> list[Formula]:
    """The parts that must all hold; [] if `f` is true."""
    if f is True:
        return []
    return sorted(f.parts, key=str) if isinstance(f, All) else [f]
