"""One entry of a tensor, as a function of its index.

`Elements.entry(node, index)` says what the entry of a node is at a *symbolic* index, by asking the node's operands for
their entries: `le(a, b)[i, j] = (a[i, 0] <= b[0, j])`, `arange(n)[i] = i`, `x[:, None][i, j] = x[i]`. So nothing of the
mask's size is ever computed, and what is found holds for all sizes. An operation that is not known, or that reads
run-time numbers, gives `Data(node, index)`: the entry itself, nothing assumed about it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any as Anything
from typing import TypeAlias

import sympy
import torch
import torch.fx as fx

from tsa_compile.passes.facts.names import Unreadable, op_name, tensor, tensor_of, value_of
from tsa_compile.passes.facts.sizes import Bounds, SizeProver, known_size, size_expr
from tsa_compile.passes.prove_mask.formula import AtMostZero, Data, Formula, IsZero
from tsa_compile.passes.prove_mask.number import Number, fits, number
from tsa_compile.passes.prove_mask.patterns import Constants
from tsa_compile.passes.prove_mask.values import Value, Where, is_formula

Index: TypeAlias = tuple[sympy.Expr, ...]
Transfer: TypeAlias = "Callable[[Elements, fx.Node, Index], Value | None]"
TRANSFERS: dict[str, Transfer] = {}


def transfer(*names: str) -> Callable[[Transfer], Transfer]:
    """Register how the entry of an operation follows from its operands; a result of None means: not known."""

    def register(fn: Transfer) -> Transfer:
        for name in names:
            TRANSFERS[name] = fn
        return fn

    return register


class Elements:
    """Entries of the tensors of one graph.

    Args:
        sizes: proves signs of size expressions.
        bounds: the range of each index symbol in use.
        written: nodes written in place; nothing is assumed about them.
        constants: tensors whose values are known.
    """

    def __init__(
        self,
        sizes: SizeProver,
        bounds: Bounds,
        written: frozenset[fx.Node] = frozenset(),
        constants: Constants | None = None,
    ) -> None:
        self.sizes = sizes
        self.bounds = dict(bounds)
        self.written = written
        self.constants = constants
        self._known: dict[tuple[fx.Node, Index], Value] = {}

    def entry(self, node: fx.Node, index: Index) -> Value:
        """The entry of `node` at `index`, one expression for each dimension."""
        key = (node, index)
        if key not in self._known:
            self._known[key] = self._entry(node, index)
        return self._known[key]

    def _entry(self, node: fx.Node, index: Index) -> Value:
        known = self.constants is not None and node in self.constants
        fn = TRANSFERS.get("constant" if known else op_name(node))
        value: Value | None = None
        if fn is not None and node not in self.written and tensor_of(node) is not None:
            with contextlib.suppress(IndexError, Unreadable):  # an operand given by name, an argument of another kind
                value = fn(self, node, index)
        if value is None or not self._representable(node, value):
            return Data(node, index)
        return value

    def _representable(self, node: fx.Node, value: Value) -> bool:
        """Does the node's dtype hold the value without rounding or wrapping, and are booleans where they belong?"""
        dtype = tensor(node).dtype
        if isinstance(value, Number):
            floating = isinstance(value.value, float)
            return dtype != torch.bool and floating == dtype.is_floating_point and fits(value, dtype)
        if isinstance(value, Where):
            return self._representable(node, value.yes) and self._representable(node, value.no)
        return not is_formula(value) or dtype == torch.bool

    # ---- operands

    def operand(self, x: Anything, node: fx.Node, index: Index) -> Value | None:
        """The entry of an operand of an elementwise operation; None if it is a number not known before the run."""
        if isinstance(x, fx.Node) and tensor_of(x) is not None:
            return self.entry(x, self.broadcast(x, index))
        x = value_of(x)
        if isinstance(x, (bool, float)):
            return x if isinstance(x, bool) else Number(x)
        expr = size_expr(x)
        return None if expr is None else number(expr)

    def broadcast(self, x: fx.Node, index: Index) -> Index:
        """The index into `x` that broadcasting pairs with an index of the result."""
        shape = self.shape(x)
        aligned = index[len(index) - len(shape) :]
        return tuple(sympy.Integer(0) if size == 1 else i for size, i in zip(shape, aligned, strict=True))

    def shape(self, x: fx.Node) -> tuple[sympy.Expr, ...]:
        return tuple(known_size(s) for s in tensor(x).shape)

    def dim(self, x: fx.Node, dim: int) -> int:
        rank = tensor(x).dim()
        return dim % rank if rank else 0

    # ---- what can be decided about an index

    def settle(self, f: Formula) -> Formula:
        """An atom that holds for every index in range, or for none, becomes true or false."""
        if isinstance(f, AtMostZero):
            if self._never_positive(f.expr):
                return True
            return False if self._never_positive(1 - f.expr) else f
        if isinstance(f, IsZero) and (self._never_positive(f.expr + 1) or self._never_positive(1 - f.expr)):
            return f.negated
        return f

    def non_negative(self, expr: sympy.Expr) -> bool:
        return self._never_positive(-expr)

    def _never_positive(self, expr: sympy.Expr) -> bool:
        top = self.sizes.maximum(expr, self.bounds)
        return top is not None and self.sizes.at_most_zero(top)

    def fresh(self, size: sympy.Expr) -> sympy.Symbol:
        """A new index symbol that runs over [0, size)."""
        symbol = sympy.Dummy("index", integer=True, nonnegative=True)
        self.bounds[symbol] = size
        return symbol

    def cases(self, value: Value) -> Sequence[Value]:
        """All values an entry may have."""
        return [*self.cases(value.yes), *self.cases(value.no)] if isinstance(value, Where) else [value]
