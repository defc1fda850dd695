"""Recognise attention written out, `softmax(scale * q k^T + mask) v`, starting from its softmax."""

from __future__ import annotations

import torch.fx as fx

from tsa_compile.passes.facts.names import SHAPE_READERS, Unreadable, arg, op_name, tensor, tensor_of
from tsa_compile.passes.find.match import Layouts, Match
from tsa_compile.passes.find.products import score_product, weighted_sum
from tsa_compile.passes.find.score_steps import MAX_STEPS, PRODUCTS, SINKS, comes_from, walk_to_product
from tsa_compile.passes.find.scores import Scores

_RESHAPES = frozenset(
    {"view", "getitem", "slice", "narrow", "flatten", "unflatten", "transpose", "permute", "squeeze", "unsqueeze"}
)


def match_manual(softmax: fx.Node) -> Match | None:
    """The attention around a softmax; None if nothing suggests that it is one.

    Raises:
        Unreadable: products before and after the softmax, but not in a form known.
    """
    tensor = tensor_of(softmax)
    if op_name(softmax) != "softmax" or tensor is None or tensor.dim() < 3:
        return None
    if arg(softmax, 1, "dim") not in (-1, tensor.dim() - 1):
        return None
    source = arg(softmax, 0, "input")
    cut = not comes_from(PRODUCTS, source)
    if cut and not comes_from(("placeholder",), source):
        return None
    output, obstacle, is_cut = _weights_use(softmax)
    if output is None:
        _check_not_reshaped(softmax)
        return None
    if cut:
        raise Unreadable(f"softmax {softmax.name}: its scores come from another graph, as after a graph break")
    if tensor.dim() > 4:
        rank = f"scores of rank {tensor.dim()}, not [batch, heads, queries, keys]"
        raise Unreadable(f"softmax {softmax.name} over {rank}")
    scores = Scores(obstacle=obstacle)
    product = score_product(walk_to_product(source, scores, softmax))
    if is_cut != (scores.sinks is not None):
        scores.obstacle = SINKS
    total = weighted_sum(output[0], output[1])
    layouts = Layouts(product.first[1], product.second[1], total.second[1], total.result)
    return Match(
        output[0],
        "manual",
        product.first[0],
        product.second[0],
        total.second[0],
        scores.product_scale,
        tuple(scores.sources),
        product.node,
        layouts,
        scores.obstacle,
        scores.softcap,
        scores.sinks,
    )


# ---- after the softmax


def _weights_use(softmax: fx.Node) -> tuple[tuple[fx.Node, fx.Node] | None, str | None, bool]:
    """((the product with v, the weights it reads), obstacle, without their last column?); follows casts and dropout."""
    at, obstacle, is_cut = softmax, None, False
    for _ in range(MAX_STEPS):
        users = [u for u in at.users if op_name(u) not in SHAPE_READERS]
        following = [u for u in users if u.args and (u.args[0] is at or op_name(u) == "einsum") and _continues(u)]
        if not following:
            return None, None, False
        if len(users) > 1:
            obstacle = "attention weights are used elsewhere"
        step = following[0]
        if op_name(step) in PRODUCTS:
            return (step, at), obstacle, is_cut
        if op_name(step) == "dropout" and _drops(step):
            obstacle = "dropout in training"
        if _cuts(step):
            obstacle = obstacle if _is_without_last(step) and not is_cut else SINKS
            is_cut = True
        at = step
    return None, None, False


def _check_not_reshaped(softmax: fx.Node) -> None:
    """Raise if the weights reach a product after all, but cut or reshaped: sinks, merged batch and heads."""
    stack = [(softmax, "")]
    for _ in range(4 * MAX_STEPS):
        if not stack:
            return
        node, how = stack.pop()
        for user in node.users:
            if how and op_name(user) in PRODUCTS and user.args[0] is node:
                raise Unreadable(f"{softmax.name}: attention weights go through {how} before they meet the values")
            if op_name(user) in _RESHAPES:
                stack.append((user, op_name(user)))
            elif _continues(user) and op_name(user) not in PRODUCTS:
                stack.append((user, how))


def _continues(node: fx.Node) -> bool:
    return _cuts(node) or _merges_heads(node) or op_name(node) in ("to", "contiguous", "clone", "dropout", "matmul", "einsum")


def _merges_heads(node: fx.Node) -> bool:
    """`[batch, heads, queries, keys]` as `[batch * heads, queries, keys]`"""
    if op_name(node) not in ("view", "flatten"):
        return False
    before, after = tensor_of(node.args[0]), tensor_of(node)
    if before is None or after is None or (before.dim(), after.dim()) != (4, 3):
        return False
    return tuple(before.shape[2:]) == tuple(after.shape[1:])


def _cuts(node: fx.Node) -> bool:
    """Does it take some of the columns: `weights[..., :-1]`, or the same as an ATen operator?"""
    if op_name(node) == "slice":
        return arg(node, 1, "dim", 0) in (-1, tensor(node).dim() - 1)
    if op_name(node) != "getitem":
        return False
    keys = node.args[1]
    return isinstance(keys, tuple) and len(keys) == 2 and keys[0] is Ellipsis and isinstance(keys[1], slice)


def _is_without_last(cut: fx.Node) -> bool:
    if op_name(cut) == "slice":
        return (arg(cut, 2, "start"), arg(cut, 3, "end"), arg(cut, 4, "step", 1)) in ((None, -1, 1), (0, -1, 1))
    keys = cut.args[1]
    return isinstance(keys, tuple) and keys[1] in (slice(None, -1), slice(0, -1), slice(None, -1, 1))


def _drops(dropout: fx.Node) -> bool:
    training = arg(dropout, 2, "training", arg(dropout, 2, "train", True))
    return arg(dropout, 1, "p", 0.5) != 0 and training is not False
