"""From the formula of a mask entry to facts: a causal band, hidden keys, or why it is neither."""

from __future__ import annotations

import dataclasses

import sympy
import torch
import torch.fx as fx

from tsa_compile.passes.facts.names import Unreadable, describe, tensor_of
from tsa_compile.passes.facts.sizes import SizeProver, known_size, linear_in
from tsa_compile.passes.prove_mask.formula import BATCH, HEAD, KEY, QUERY, AtMostZero, Data, Formula, conjuncts
from tsa_compile.passes.prove_mask.proven import KeyTerm, ProvenMask
from tsa_compile.passes.site import Size

INDICES = (BATCH, HEAD, QUERY, KEY)


@dataclasses.dataclass(frozen=True)
class Lengths:
    """`q_len` and `k_len` as expressions, and `q_len` as the graph has it."""

    q: sympy.Expr
    k: sympy.Expr
    q_size: Size


def classify(formula: Formula, lengths: Lengths, sizes: SizeProver, written: frozenset[fx.Node]) -> ProvenMask:
    """The facts that `formula`, true where query `QUERY` sees key `KEY`, amounts to.

    Raises:
        Unreadable: it amounts to none.
    """
    if formula is False:
        raise Unreadable("mask hides every key")
    uppers: list[sympy.Expr] = []  # key <= query + u
    lowers: list[sympy.Expr] = []  # key >= query + l
    ends: list[sympy.Expr] = []  # key <= e
    data: list[Data] = []
    for part in conjuncts(formula):
        if isinstance(part, AtMostZero):
            _sort_band(part.expr, uppers, lowers, ends)
        elif isinstance(part, Data):
            data.append(part)
        else:
            raise Unreadable(f"mask is not a causal band: {_text(part)}")
    facts = _band(_tightest(uppers, sizes), _tightest([-x for x in lowers], sizes), lengths, sizes)
    _check_ends(ends, facts, lengths, sizes)
    return dataclasses.replace(facts, key_mask=tuple(_key_term(x, written) for x in data))


def _sort_band(expr: sympy.Expr, uppers: list[sympy.Expr], lowers: list[sympy.Expr], ends: list[sympy.Expr]) -> None:
    linear = linear_in(expr, INDICES)
    if linear is None:
        raise Unreadable(f"mask is not a causal band: {expr} <= 0")
    factors, rest = linear
    if factors == {KEY: 1, QUERY: -1}:
        uppers.append(-rest)
    elif factors == {KEY: -1, QUERY: 1}:
        lowers.append(rest)
    elif factors == {KEY: 1}:
        ends.append(-rest)
    else:
        raise Unreadable(f"mask is not a causal band: {expr} <= 0")


def _tightest(bounds: list[sympy.Expr], sizes: SizeProver) -> sympy.Expr | None:
    """The smallest of the bounds, if it can be told."""
    best: sympy.Expr | None = None
    for b in bounds:
        if best is None or sizes.at_most_zero(b - best):
            best = b
        elif not sizes.at_most_zero(best - b):
            raise Unreadable(f"mask has two bounds that cannot be compared: {best} and {b}")
    return best


def _band(upper: sympy.Expr | None, minus_lower: sympy.Expr | None, lengths: Lengths, sizes: SizeProver) -> ProvenMask:
    if upper is None:
        if minus_lower is not None:
            raise Unreadable(f"mask hides earlier keys but not later ones (key >= query - {minus_lower})")
        return ProvenMask()
    keys_used = _keys_used(upper, lengths, sizes)
    if minus_lower is None:
        return ProvenMask(causal=True, keys_used=keys_used)
    window = sympy.expand(upper + minus_lower + 1)
    if not window.is_Integer or window < 1:
        raise Unreadable(f"sliding window of unknown width {window}")
    return ProvenMask(causal=True, window=int(window), keys_used=keys_used)


def _keys_used(offset: sympy.Expr, lengths: Lengths, sizes: SizeProver) -> Size | None:
    """None if `key <= query + offset` puts the queries at the end of all keys; else at the end of how many."""
    past = lengths.k - lengths.q
    if not sizes.at_most_zero(-past):
        raise Unreadable(f"cannot show that there are at least as many keys ({lengths.k}) as queries ({lengths.q})")
    if sizes.is_zero(offset - past):
        return None
    if sizes.is_zero(offset):
        return lengths.q_size
    if offset.is_Integer and offset > 0 and isinstance(lengths.q_size, int) and sizes.at_most_zero(offset - past):
        return lengths.q_size + int(offset)
    raise Unreadable(f"causal with offset {offset}, where the last queries need {sympy.expand(past)}")


def _check_ends(ends: list[sympy.Expr], facts: ProvenMask, lengths: Lengths, sizes: SizeProver) -> None:
    """`key <= end` is fine where causality says it already."""
    last = lengths.k - 1
    if facts.keys_used is not None:
        last = known_size(facts.keys_used) - 1
    for end in ends:
        if not (facts.causal and sizes.at_most_zero(last - end)):
            raise Unreadable(f"mask cuts the keys off after {end}")


def _key_term(atom: Data, written: frozenset[fx.Node]) -> KeyTerm:
    """A run-time boolean as a mask of keys."""
    example = tensor_of(atom.node)
    if example is None or example.dtype != torch.bool:
        raise Unreadable(f"mask is computed from {describe(atom.node)}, which is not a bool tensor")
    if atom.node in written:
        raise Unreadable(f"mask reads {describe(atom.node)}, which is written in place")
    reads = set().union(*(i.free_symbols for i in atom.index)) if atom.index else set()
    if QUERY in reads:
        which = "query and key" if KEY in reads else "query"
        raise Unreadable(f"mask varies with {which} in a way that is not understood: {describe(atom.node)}")
    if HEAD in reads:
        raise Unreadable(f"mask differs between heads: {describe(atom.node)}")
    return KeyTerm(atom.node, tuple(_axis(i, atom.node) for i in atom.index), atom.negated)


def _axis(i: sympy.Expr, node: fx.Node) -> tuple[str, int]:
    for name, symbol in (("key", KEY), ("batch", BATCH), ("fixed", sympy.Integer(0))):
        shift = sympy.expand(i - symbol)
        if shift.is_Integer and shift >= 0:
            return name, int(shift)
    raise Unreadable(f"mask reads {describe(node)} at {i}")


def _text(part: Formula) -> str:
    text = str(part)
    return text if len(text) <= 80 else text[:77] + "..."
