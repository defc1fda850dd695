"""What is done to the scores of an attention written out, read from its softmax back to the product of q and k."""

from __future__ import annotations

import dataclasses
from collections.abc import Container
from typing import Any

import torch.fx as fx

from tsa_compile.passes.facts.mutation import writes_to
from tsa_compile.passes.facts.names import Unreadable, arg, number_of, op_name, source, tensor, tensor_of
from tsa_compile.passes.find.scores import Scores
from tsa_compile.passes.prove_mask.source import MaskSource

PRODUCTS = ("matmul", "einsum", "baddbmm")
MAX_STEPS = 16
SINKS = "attention sinks: columns that are no keys take part in the softmax"
_STEPS = frozenset({"to", "contiguous", "clone", "add", "sub", "mul", "div", "where", "masked_fill", "tanh", "view", "cat"})


def comes_from(origins: Container[str], x: fx.Node) -> bool:
    """Is there one of these operations among what the scores are made of, elementwise steps aside?"""
    stack, seen = [x], set[fx.Node]()
    while stack and len(seen) < 4 * MAX_STEPS:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if _base_name(node) in origins:
            return True
        if _base_name(node) in _STEPS:
            stack += [a for a in node.all_input_nodes if tensor_of(a) is not None]
    return False


def walk_to_product(x: Any, scores: Scores, softmax: fx.Node) -> fx.Node:
    """The product of q and k, with all that is done to it recorded in `scores`."""
    for _ in range(MAX_STEPS):
        name = _base_name(x)
        if name in PRODUCTS:
            if name == "baddbmm":
                _read_baddbmm(x, scores)
            return x
        step = _STEP_READERS.get(name)
        following = step(x, scores) if step is not None else None
        if following is None:
            raise Unreadable(f"softmax {softmax.name}: cannot read its scores through {x.name} ({name})")
        _note_in_place(x, following, scores)
        x = following
    raise Unreadable(f"softmax {softmax.name}: too many steps between the product and the softmax")


def _base_name(node: Any) -> str:
    """The operation's name, in place or not."""
    name = op_name(node)
    if name in ("iadd", "imul", "itruediv"):
        return name[1:].replace("true", "")
    return name[:-1] if name.endswith("_") and not name.startswith("_") else name


def _note_in_place(x: fx.Node, source: fx.Node, scores: Scores) -> None:
    if writes_to(x) and len(source.users) > 1:
        scores.obstacle = f"scores {source.name} are written in place and read elsewhere"


def _read_copy(x: fx.Node, scores: Scores) -> fx.Node:
    return source(x)


def _read_view(x: fx.Node, scores: Scores) -> fx.Node | None:
    """`[batch * heads, queries, keys]` as `[batch, heads, queries, keys]`: what masks them from here on was one for both."""
    before, after = tensor(source(x)), tensor(x)
    if (before.dim(), after.dim()) != (3, 4) or tuple(before.shape[1:]) != tuple(after.shape[2:]) or scores.sinks is not None:
        return None
    scores.sources = [dataclasses.replace(s, split=(after.shape[0], after.shape[1])) for s in scores.sources]
    return source(x)


def _read_add(x: fx.Node, scores: Scores) -> fx.Node | None:
    if x.kwargs.get("alpha", 1) != 1 or len(x.args) != 2:
        return None
    for score, mask in (x.args, reversed(x.args)):
        if isinstance(score, fx.Node) and isinstance(mask, fx.Node) and _is_score(score, x):
            scores.add(MaskSource("add", mask, factor=scores.factor))
            return score
    return None


def _read_baddbmm(x: fx.Node, scores: Scores) -> None:
    """beta * mask + alpha * q k^T; a beta of 0 means that there is no mask, whatever lies there."""
    beta, alpha = x.kwargs.get("beta", 1), x.kwargs.get("alpha", 1)
    if beta != 0:
        if not isinstance(beta, (int, float)) or beta <= 0:
            raise Unreadable(f"{x.name}: baddbmm with beta={beta}")
        scores.add(MaskSource("add", source(x), factor=scores.factor * beta))
    scores.scaled(alpha)


def _read_sub(x: fx.Node, scores: Scores) -> fx.Node | None:
    """A number for each row, such as its maximum, changes no softmax."""
    score, shift = x.args[:2]
    by_row = isinstance(shift, (int, float)) or ((t := tensor_of(shift)) is not None and (not t.dim() or t.shape[-1] == 1))
    return score if by_row and isinstance(score, fx.Node) and _is_score(score, x) else None


def _read_cat(x: fx.Node, scores: Scores) -> fx.Node | None:
    """A column beside those of the keys, as sinks are."""
    parts = list(x.args[0]) if isinstance(x.args[0], (tuple, list)) else []
    if not parts or not isinstance(parts[0], fx.Node) or arg(x, 1, "dim", 0) not in (-1, tensor(x).dim() - 1):
        return None
    column = tensor_of(parts[1]) if len(parts) == 2 else None
    if column is None or column.shape[-1] != 1 or scores.sinks is not None or scores.factor != 1.0 or scores.sources:
        scores.obstacle = SINKS
    else:
        scores.sinks = parts[1]
    return parts[0]


def _read_where(x: fx.Node, scores: Scores) -> fx.Node | None:
    condition, yes, no = _where_operands(x)
    if _is_score(yes, x) and not _is_score(no, x):
        scores.add(MaskSource("show", condition, no, scores.factor))
        return yes
    if _is_score(no, x) and not _is_score(yes, x):
        scores.add(MaskSource("hide", condition, yes, scores.factor))
        return no
    return None


def _where_operands(x: fx.Node) -> tuple[Any, Any, Any]:
    if len(x.args) != 3:
        return None, None, None
    a, b, c = x.args
    return (b, a, c) if x.op == "call_method" else (a, b, c)


def _read_masked_fill(x: fx.Node, scores: Scores) -> fx.Node:
    scores.add(MaskSource("hide", arg(x, 1, "mask"), arg(x, 2, "value"), scores.factor))
    return source(x)


def _read_mul(x: fx.Node, scores: Scores) -> fx.Node | None:
    a, b = x.args[:2]
    score, by = (b, a) if isinstance(b, fx.Node) and _is_score(b, x) else (a, b)
    if not isinstance(score, fx.Node) or ((t := tensor_of(by)) is not None and t.dim()):
        return None
    scores.scaled(by)
    return score


def _read_div(x: fx.Node, scores: Scores) -> fx.Node | None:
    a, b = x.args[:2]
    if not isinstance(a, fx.Node) or x.kwargs.get("rounding_mode") is not None:
        return None
    b = number_of(b)
    scores.scaled(1.0 / b if isinstance(b, (int, float)) and b > 0 else b if isinstance(b, fx.Node) else None)
    return a


def _read_tanh(x: fx.Node, scores: Scores) -> fx.Node:
    scores.capped()
    return source(x)


def _is_score(x: Any, result: fx.Node) -> bool:
    """Does the way to the product lead through this operand: as large as the result, and made from a product?"""
    example = tensor_of(x) if isinstance(x, fx.Node) else None
    if example is None or not example.is_floating_point() or example.dim() != tensor(result).dim():
        return False
    return comes_from(PRODUCTS, x)


_STEP_READERS = {
    "to": _read_copy,
    "contiguous": _read_copy,
    "clone": _read_copy,
    "view": _read_view,
    "add": _read_add,
    "sub": _read_sub,
    "cat": _read_cat,
    "where": _read_where,
    "masked_fill": _read_masked_fill,
    "mul": _read_mul,
    "div": _read_div,
    "tanh": _read_tanh,
}
