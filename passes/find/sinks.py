"""The column beside the scores that takes part in a softmax without a value: is it one number for each head, as sinks are?"""

from __future__ import annotations

import sympy
import torch.fx as fx

from tsa_compile.passes.facts.graph_facts import GraphFacts
from tsa_compile.passes.facts.names import tensor_of
from tsa_compile.passes.facts.sizes import known_size
from tsa_compile.passes.find.match import Match
from tsa_compile.passes.prove_mask.formula import BATCH, HEAD, QUERY, Data
from tsa_compile.passes.prove_mask.prove import MaskProver
from tsa_compile.passes.prove_mask.proven import HeadTerm
from tsa_compile.passes.site import Size


def sinks_of(match: Match, shape: tuple[Size, Size, Size, Size], masks: MaskProver, facts: GraphFacts) -> HeadTerm | None:
    """Where the sinks of each head stand; None: it is not shown that the column is that.

    Args:
        match: with such a column.
        shape: (batch, heads, q_len, k_len) of the scores.
    """
    column = match.sinks
    if column is None or "h" not in match.layouts.q:
        return None
    found = masks.entry(column, shape, (BATCH, HEAD, QUERY, sympy.Integer(0)))
    if not isinstance(found, Data) or found.negated or found.node in facts.written:
        return None
    at = [n for n, i in enumerate(found.index) if i == HEAD]
    fixed = all(n in at or i.is_Integer for n, i in enumerate(found.index))
    if len(at) != 1 or not fixed or not facts.sizes.is_zero(_length(found.node, at[0]) - known_size(shape[1])):
        return None
    return HeadTerm(found.node, tuple(None if i == HEAD else int(i) for i in found.index))


def _length(node: fx.Node, dim: int) -> sympy.Expr:
    example = tensor_of(node)
    assert example is not None
    return known_size(example.shape[dim])
