"""Sizes as sympy expressions, and comparisons of them that hold for every run the graph serves, never by example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
import torch.fx as fx

from tsa_compile.passes.facts.names import Unreadable, value_of

Bounds = Mapping[sympy.Symbol, sympy.Expr]  # index symbol -> its size: the index runs over [0, size)


def size_expr(x: Any) -> sympy.Expr | None:
    """An int, SymInt or the node of one, as an expression; None for anything else (bools included)."""
    x = value_of(x)
    if isinstance(x, bool):
        return None
    if isinstance(x, int):
        return sympy.Integer(x)
    return sympy.sympify(x.node.expr) if isinstance(x, torch.SymInt) else None


def known_size(x: Any) -> sympy.Expr:
    """`size_expr` of what is a size.

    Raises:
        Unreadable: it is none.
    """
    size = size_expr(x)
    if size is None:
        raise Unreadable(f"{x} is not a size")
    return size


class SizeProver:
    """Proves signs of size expressions with the symbols' ranges of the graph's `ShapeEnv`.

    Args:
        graph: where the shape environment is looked up; static graphs have none and need none.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._env = next((env for node in graph.nodes if (env := _shape_env(value_of(node))) is not None), None)

    def is_zero(self, expr: sympy.Expr) -> bool:
        """Is `expr == 0` always?"""
        return sympy.expand(self._simplify(expr)) == 0

    def same(self, a: Any, b: Any) -> bool:
        """Are two sizes equal always?"""
        return self.is_zero(known_size(a) - known_size(b))

    def at_most_zero(self, expr: sympy.Expr) -> bool:
        """Is `expr <= 0` always, as far as can be proven?"""
        expr = sympy.expand(self._simplify(expr))
        if not expr.free_symbols:
            return bool(expr <= 0)
        if self._env is None:
            return False
        return bool(self._env.bound_sympy(expr).upper <= 0)

    def maximum(self, expr: sympy.Expr, bounds: Bounds) -> sympy.Expr | None:
        """The largest value of `expr` over the index box `bounds`; None if it is not linear in the indices."""
        linear = linear_in(expr, tuple(bounds))
        if linear is None:
            return None
        factors, rest = linear
        for symbol, factor in factors.items():
            if not factor.is_Integer:
                return None
            if factor > 0:
                rest = rest + factor * (bounds[symbol] - 1)
        return sympy.expand(rest)

    def _simplify(self, expr: sympy.Expr) -> sympy.Expr:
        return self._env.simplify(expr) if self._env is not None and expr.free_symbols else expr


def linear_in(expr: sympy.Expr, symbols: tuple[sympy.Symbol, ...]) -> tuple[dict[sympy.Symbol, sympy.Expr], sympy.Expr] | None:
    """`expr` as (factor of each symbol, rest), or None if it is not linear in `symbols`."""
    expr = sympy.expand(expr)
    factors = {s: expr.coeff(s, 1) for s in symbols if s in expr.free_symbols}
    rest = sympy.expand(expr - sum((f * s for s, f in factors.items()), sympy.Integer(0)))
    left = set(symbols) & (rest.free_symbols.union(*(f.free_symbols for f in factors.values())))
    return None if left else (factors, rest)


def _shape_env(value: Any) -> Any:
    if isinstance(value, torch.SymInt):
        return value.node.shape_env
    if isinstance(value, torch.Tensor):
        return next((env for s in value.shape if (env := _shape_env(s)) is not None), None)
    return None
