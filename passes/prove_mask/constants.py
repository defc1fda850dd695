"""Entries of tensors whose values are known."""

from __future__ import annotations

import sympy
import torch
import torch.fx as fx

from tsa_compile.passes.prove_mask.element import Elements, Index, transfer
from tsa_compile.passes.prove_mask.formula import AtMostZero, both
from tsa_compile.passes.prove_mask.number import number
from tsa_compile.passes.prove_mask.patterns import Band, Progression, Scalar, Uniform
from tsa_compile.passes.prove_mask.values import Value, select


@transfer("constant")
def _constant(elements: Elements, node: fx.Node, index: Index) -> Value | None:
    assert elements.constants is not None
    pattern = elements.constants.pattern(node)
    if isinstance(pattern, Uniform):
        return _scalar(pattern.value)
    if isinstance(pattern, Progression):
        return number(sympy.Integer(pattern.start) + pattern.step * index[pattern.dim])
    if isinstance(pattern, Band):
        return _band_value(elements, pattern, *(index[d] for d in pattern.dims))
    return None


def _band_value(elements: Elements, band: Band, row: sympy.Expr, column: sympy.Expr) -> Value | None:
    within = elements.settle(AtMostZero(sympy.expand(column - row - band.last)))
    if band.first is not None:
        within = both(within, elements.settle(AtMostZero(sympy.expand(row + band.first - column))))
    dtype = torch.bool if isinstance(band.inside, bool) else torch.float32  # of the choice: boolean or not
    return select(within, _scalar(band.inside), _scalar(band.outside), dtype)


def _scalar(x: Scalar) -> Value:
    return x if isinstance(x, bool) else number(x)
