"""Prove what a mask says, from the graph that computes it: causal, sliding window, padding, or not proven.

A proof, not a probe: the mask's computation is read symbolically (`mask_transfer.py`), so the answer holds for every size the
graph accepts and costs the same at 128K x 128K. Whatever is not understood leaves the mask unproven, with the reason.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch.fx as fx

from tsa_compile.passes.graph_names import is_zero, name_of, not_negative, shape_of, value_of
from tsa_compile.passes.mask_transfer import MaskReader, as_truth
from tsa_compile.passes.mask_values import Additive, Data, Never, Relation, Truth, Value, relation
from tsa_compile.passes.site import KeyMask, MaskFacts

QUERY, KEY, HEAD, BATCH = -2, -1, -3, -4


def unproven(reason: str) -> MaskFacts:
    return MaskFacts(unproven=reason)


def prove_masks(
    masks: list[tuple[str, fx.Node]],
    is_causal: bool,
    q: fx.Node,
    k: fx.Node,
    reader: MaskReader,
) -> MaskFacts:
    """The facts of all masks of one attention together.

    Args:
        masks: how each mask is applied ("bool": true may be read; "hidden": true may not; "add": added to the scores), and its node.
        is_causal: the attention's own flag, aligned at the top left as PyTorch defines it.
        q, k: nodes `[B, H, Lq, D]` and `[B, Hk, Lk, D]`.
        reader: of the graph.
    """
    q_len, k_len = shape_of(q)[2], shape_of(k)[2]
    whole = Truth(frozenset())
    for kind, node in masks:
        visible = _visible(kind, reader.value(node), shape_of(node))
        if isinstance(visible, str):
            return unproven(f"{visible} ({_describe(node)})")
        if isinstance(visible, Never):
            return unproven(f"mask hides every key ({_describe(node)})")
        whole = whole & visible
    shape = (sympy.Integer(1), sympy.Integer(1), q_len, k_len)
    return _classify(whole, is_causal, q_len, k_len, shape)


def _describe(node: fx.Node) -> str:
    value = value_of(node)
    return f"{name_of(node)} {node.name}, {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def _visible(kind: str, value: Value | None, shape: Any) -> Truth | Never | str:
    """Where a key may be read, or why that is not known."""
    if kind == "add":
        if isinstance(value, Additive):
            return value.visible
        if value is not None and not value.dims and as_truth(value) == Never():
            return Truth(frozenset())  # adds zero
        return "mask adds values that are not proven to be 0 or -inf"
    truth = as_truth(value)
    if truth is None:
        return "mask is not understood"
    if kind == "hidden":
        from tsa_compile.passes.mask_values import negate

        inverse = negate(truth, shape)
        return inverse if isinstance(inverse, (Truth, Never)) else "negated mask is not understood"
    return truth


def _classify(truth: Truth, is_causal: bool, q_len: Any, k_len: Any, shape: Any) -> MaskFacts:
    upper: list[Any] = [sympy.Integer(0)] if is_causal else []  # j <= i + c
    lower: list[Any] = []  # j >= i + c
    keys: list[KeyMask] = []
    for atom in sorted(truth.atoms, key=repr):
        if isinstance(atom, Data):
            if not atom.dims <= {KEY, BATCH} or KEY not in atom.dims:
                return unproven(f"mask depends on data along {_dim_names(atom.dims)}: {_describe(atom.node)}")
            axis = dict(atom.axis)
            keys.append(KeyMask(atom.node, axis[KEY], axis.get(BATCH)))
            continue
        reduced = relation(atom.left, shape)
        if reduced == Truth(frozenset()):
            continue
        bound = _bound(atom)
        if bound is None:
            return unproven(f"mask is not causal: it needs {_formula(atom)} <= 0 for query i, key j")
        (upper if bound[0] == "upper" else lower).append(bound[1])
    return _facts(upper, lower, keys, q_len, k_len)


def _bound(atom: Relation) -> tuple[str, Any] | None:
    terms, const = dict(atom.left.terms), atom.left.const
    if set(terms) != {KEY, QUERY} or terms[KEY] != -terms[QUERY] or not isinstance(const, sympy.Expr):
        return None
    step = abs(terms[KEY])
    if step != 1:
        return None
    return ("upper", -const) if terms[KEY] > 0 else ("lower", const)


def _facts(upper: list[Any], lower: list[Any], keys: list[KeyMask], q_len: Any, k_len: Any) -> MaskFacts:
    if not upper and not lower:
        return MaskFacts(key_masks=tuple(keys))
    if not upper:
        return unproven("mask bounds keys from below only")
    c, start = _extreme(upper, smallest=True), _extreme(lower, smallest=False) if lower else None
    if c is None or (lower and start is None):
        return unproven(f"mask has bounds that cannot be compared: {upper} {lower}")
    window = None if start is None else sympy.expand(c - start + 1)
    if window is not None and not window.is_Integer:
        return unproven(f"sliding window of unknown width {window}")
    offset = None
    if not is_zero(c - (k_len - q_len)):
        if not (c.is_Integer and c >= 0 and not_negative(k_len - q_len - c)):
            return unproven(f"causal with offset {c}, but {q_len} queries and {k_len} keys")
        offset = int(c)
    return MaskFacts(True, offset, None if window is None else int(window), tuple(keys))


def _extreme(bounds: list[Any], smallest: bool) -> Any:
    """The smallest (largest) of the expressions; None if two cannot be compared."""
    best = bounds[0]
    for b in bounds[1:]:
        difference = b - best if smallest else best - b
        if not_negative(difference):
            continue
        if not not_negative(-difference):
            return None
        best = b
    return best


def _formula(atom: Relation) -> str:
    names = {KEY: "j", QUERY: "i", HEAD: "head", BATCH: "batch"}
    terms = [f"{c} {names.get(d, d)}" for d, c in atom.left.terms]
    return " + ".join([*terms, str(atom.left.const)])


def _dim_names(dims: frozenset[int]) -> str:
    names = {KEY: "keys", QUERY: "queries", HEAD: "heads", BATCH: "batch"}
    return ", ".join(names.get(d, str(d)) for d in sorted(dims)) or "nothing"


__all__ = ["MaskFacts", "prove_masks", "unproven"]
