"""What the prover knows about a tensor of a mask's computation: the abstract domain.

A tensor is a function of its index (i_-1, i_-2, ...; dims are counted from the end, so that broadcasting changes nothing).
Every class below is a statement about that function that holds for every index and every value of the graph's symbols.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch.fx as fx

from tsa_compile.passes.graph_names import not_negative

Shape = tuple[sympy.Expr, ...]


@dataclasses.dataclass(frozen=True)
class Affine:
    """`const + sum(coefficient * i_dim)`: arange, positions, and constants (no terms; `const` may be a float)."""

    terms: tuple[tuple[int, int], ...]
    const: Any

    @property
    def dims(self) -> frozenset[int]:
        return frozenset(d for d, _ in self.terms)

    def plus(self, other: Affine, factor: int = 1) -> Affine:
        terms = dict(self.terms)
        for d, c in other.terms:
            terms[d] = terms.get(d, 0) + factor * c
        return affine(terms, self.const + factor * other.const)

    def times(self, factor: Any) -> Affine:
        return affine({d: c * factor for d, c in self.terms}, self.const * factor)


def affine(terms: Mapping[int, int], const: Any) -> Affine:
    """An `Affine` in normal form."""
    return Affine(tuple(sorted((d, int(c)) for d, c in terms.items() if c)), const)


def constant(value: Any) -> Affine:
    return Affine((), value)


@dataclasses.dataclass(frozen=True)
class Relation:
    """`left <= 0`, with `left` affine."""

    left: Affine

    @property
    def dims(self) -> frozenset[int]:
        return self.left.dims


@dataclasses.dataclass(frozen=True)
class Data:
    """The values of `node`, known only to vary along `dims`; `axis` maps those dims to dims of the node (from the end)."""

    node: fx.Node
    axis: tuple[tuple[int, int], ...]

    @property
    def dims(self) -> frozenset[int]:
        return frozenset(d for d, _ in self.axis)


@dataclasses.dataclass(frozen=True)
class Truth:
    """True exactly where all atoms hold; no atoms: everywhere. Also its image as numbers 1 and 0."""

    atoms: frozenset[Relation | Data]

    @property
    def dims(self) -> frozenset[int]:
        return frozenset().union(*(a.dims for a in self.atoms))

    def __and__(self, other: Truth) -> Truth:
        return Truth(self.atoms | other.atoms)


@dataclasses.dataclass(frozen=True)
class Never:
    """False (0) everywhere."""

    dims: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class Additive:
    """0 where `visible` is true, at most -1e4 elsewhere: a mask to be added to scores."""

    visible: Truth

    @property
    def dims(self) -> frozenset[int]:
        return self.visible.dims


Value = Affine | Truth | Never | Additive | Data
ALWAYS = Truth(frozenset())


def relation(left: Affine, shape: Shape) -> Truth | Never:
    """`left <= 0` over tensors of `shape`, reduced where it holds everywhere or nowhere."""
    highest = lowest = left.const
    for d, c in left.terms:
        last = shape[d] - 1
        highest, lowest = highest + max(c, 0) * last, lowest + min(c, 0) * last
    if not_negative(-highest):
        return ALWAYS
    if not_negative(lowest - 1):
        return Never()
    return Truth(frozenset({Relation(left)}))


def negate(value: Value, shape: Shape) -> Value | None:
    """The logical not, or None if the domain cannot express it."""
    if isinstance(value, Never):
        return ALWAYS
    if value == ALWAYS:
        return Never()
    if isinstance(value, Truth) and len(value.atoms) == 1:
        (atom,) = value.atoms
        if isinstance(atom, Relation):  # not (left <= 0)  =  1 - left <= 0
            return relation(constant(sympy.Integer(1)).plus(atom.left, -1), shape)
    return None


def remap(value: Value, move: Callable[[int], int | None]) -> Value | None:
    """The value with dim d renamed to move(d); None if a dim it varies along is gone (move gives None)."""
    if any(move(d) is None for d in value.dims):
        return None

    def atom(a: Any) -> Any:
        if isinstance(a, Relation):
            return Relation(remap(a.left, move))
        if isinstance(a, Affine):
            return affine({move(d): c for d, c in a.terms}, a.const)
        return Data(a.node, tuple(sorted((move(d), n) for d, n in a.axis)))

    if isinstance(value, Truth):
        return Truth(frozenset(atom(a) for a in value.atoms))
    if isinstance(value, Additive):
        return Additive(remap(value.visible, move))
    return value if isinstance(value, Never) else atom(value)


def shift(value: Value, dim: int, start: Any, size: Any, keep: bool) -> Value | None:
    """The value where i_dim is replaced by i_dim + start (or by start alone: `keep` False); None if it cannot be said."""

    def move(a: Affine) -> Affine:
        coefficient = dict(a.terms).get(dim, 0)
        terms = {d: c for d, c in a.terms if keep or d != dim}
        return affine(terms, a.const + coefficient * start)

    if dim not in value.dims:
        return value
    if isinstance(value, Affine):
        return move(value)
    if isinstance(value, Truth) and all(isinstance(a, Relation) or dim not in a.dims for a in value.atoms):
        return Truth(frozenset(Relation(move(a.left)) if isinstance(a, Relation) else a for a in value.atoms))
    if isinstance(value, Additive):
        visible = shift(value.visible, dim, start, size, keep)
        return Additive(visible) if isinstance(visible, Truth) else None
    return None
