"""The two products of an attention written out, q k^T and weights v: `matmul`, or `einsum` in any order. Heads are optional."""

from __future__ import annotations

import dataclasses

import torch.fx as fx

from tsa_compile.passes.facts.names import Unreadable, arg, dims_of, op_name, source, tensor, tensor_of

Operand = tuple[fx.Node, str]  # a tensor and its order of dimensions: b batch, h heads, l length, d head dim


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of two tensors whose roles are known; `result` is the order of dimensions of a weighted sum."""

    node: fx.Node
    first: Operand
    second: Operand
    result: str = ""


def score_product(node: fx.Node) -> Product:
    """q and k of a product that gives scores [batch, heads, queries, keys] or [batch, queries, keys].

    Raises:
        Unreadable: an einsum of another form.
    """
    if op_name(node) == "einsum":
        x, y, z, a, b = _einsum(node)
        if z[-2] in y or z[-1] in x:
            raise Unreadable(f"{node.name}: einsum {node.args[0]!r} is not a product of queries and keys")
        contracted = next(iter(set(x) - set(z)))
        roles = {**dict(zip(z[:-2], "bh", strict=False)), contracted: "d"}
        return Product(node, (a, _named(x, {**roles, z[-2]: "l"})), (b, _named(y, {**roles, z[-1]: "l"})))
    q, k = _factors(node)
    outer = _outer_dims(node, q, k)
    before = _before_transpose(k)
    return Product(node, (q, outer + "ld"), (before, outer + "ld") if before is not None else (k, outer + "dl"))


def weighted_sum(node: fx.Node, weights: fx.Node) -> Product:
    """v of a product of `weights` [batch, heads, queries, keys], or without heads, and v.

    Raises:
        Unreadable: an einsum of another form.
    """
    if op_name(node) == "einsum":
        x, y, z, a, b = _einsum(node)
        if b is weights and a is not weights:
            x, y, a, b = y, x, b, a
        if a is not weights or x[-2] in y or x[-1] not in y or x[-1] in z:
            raise Unreadable(f"{node.name}: einsum {node.args[0]!r} is not a product of weights and values")
        head_dim = next(iter(set(y) - set(x)), "")
        roles = {**dict(zip(x[:-2], "bh", strict=False)), head_dim: "d"}
        return Product(node, (a, "bhlk"), (b, _named(y, {**roles, x[-1]: "l"})), _named(z, {**roles, x[-2]: "l"}))
    first, v = _factors(node)
    if first is not weights:
        raise Unreadable(f"{node.name}: attention weights are the second operand")
    layout = _outer_dims(node, weights, v) + "ld"
    return Product(node, (weights, "bhlk"), (v, layout), layout)


def _outer_dims(node: fx.Node, a: fx.Node, b: fx.Node) -> str:
    """ "bh", or "b" for a product without a dimension of heads."""
    ranks = [t.dim() if (t := tensor_of(x)) is not None else None for x in (a, b)]
    if ranks not in ([4, 4], [3, 3]):
        raise Unreadable(f"{node.name}: a product of tensors of rank {ranks}, not [batch, heads, ., .] or [batch, ., .]")
    return "bh" if ranks[0] == 4 else "b"


def _einsum(node: fx.Node) -> tuple[str, str, str, fx.Node, fx.Node]:
    """(first letters, second letters, result letters, first, second)"""
    equation, operands = node.args[0], node.args[1:]
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    text = str(equation).replace(" ", "")
    left, arrow, z = text.partition("->")
    letters = left.split(",")
    terms = (*letters, z)
    plain = arrow and len(operands) == len(letters) == 2 and all(s.isalpha() and len(set(s)) == len(s) for s in terms)
    if not plain or {len(s) for s in terms} not in ({4}, {3}):
        raise Unreadable(f"{node.name}: einsum {equation!r} is not of two tensors of rank 4, or 3")
    return letters[0], letters[1], z, _node(node, operands[0]), _node(node, operands[1])


def _factors(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The tensors that a `matmul` or a `baddbmm` multiplies."""
    if op_name(node) == "baddbmm":
        return _node(node, arg(node, 1, "batch1")), _node(node, arg(node, 2, "batch2"))
    second = arg(node, 1, "other", node.kwargs.get("mat2"))
    return _node(node, arg(node, 0, "input")), _node(node, second)


def _node(product: fx.Node, x: object) -> fx.Node:
    if not isinstance(x, fx.Node):
        raise Unreadable(f"{product.name}: a product with {x!r}, which is no tensor of the graph")
    return x


def _named(letters: str, roles: dict[str, str]) -> str:
    if set(letters) != set(roles):
        raise Unreadable(f"einsum term {letters!r} is not one of batch, heads, length and head dim")
    return "".join(roles[c] for c in letters)


def _before_transpose(x: fx.Node) -> fx.Node | None:
    """k where `x` is k with its last two dimensions swapped."""
    while op_name(x) in ("contiguous", "clone"):
        x = source(x)
    name, rank = op_name(x), tensor(x).dim()
    if name == "transpose" and {arg(x, n, f"dim{n - 1}") % rank for n in (1, 2)} == {rank - 2, rank - 1}:
        return source(x)
    if name == "mT" or (name == "getattr" and x.args[1] == "mT"):
        return source(x)
    if name == "permute":
        swapped = [*range(rank - 2), rank - 1, rank - 2]
        return source(x) if [d % rank for d in dims_of(x)] == swapped else None
    return None
