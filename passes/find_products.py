"""The two products of an attention written out, q k^T and weights v: `matmul`, or `einsum` in any order."""

from __future__ import annotations

import dataclasses

import torch.fx as fx

from tsa_compile.passes.graph_names import arg, op_name, tensor_of
from tsa_compile.passes.match import Unrecognised

Operand = tuple[fx.Node, str]  # a tensor and its order of dimensions: b batch, h heads, l length, d head dim


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of two tensors whose roles are known; `result` is the order of dimensions of a weighted sum."""

    node: fx.Node
    first: Operand
    second: Operand
    result: str = ""


def score_product(node: fx.Node) -> Product:
    """q and k of a product that gives scores [batch, heads, queries, keys].

    Raises:
        Unrecognised: an einsum of another form.
    """
    if op_name(node) == "einsum":
        x, y, z, a, b = _einsum(node)
        if len(set(z)) != 4 or z[2] in y or z[3] in x:
            raise Unrecognised(f"{node.name}: einsum {node.args[0]!r} is not a product of queries and keys")
        contracted = next(iter(set(x) - set(z)))
        roles = {z[0]: "b", z[1]: "h", contracted: "d"}
        return Product(node, (a, _named(x, {**roles, z[2]: "l"})), (b, _named(y, {**roles, z[3]: "l"})))
    q, k = node.args[:2]
    _check_rank(node, q, k)  # type: ignore[arg-type]
    source = _before_transpose(k)  # type: ignore[arg-type]
    return Product(node, (q, "bhld"), (source, "bhld") if source is not None else (k, "bhdl"))  # type: ignore[arg-type]


def weighted_sum(node: fx.Node, weights: fx.Node) -> Product:
    """v of a product of `weights` [batch, heads, queries, keys] and v.

    Raises:
        Unrecognised: an einsum of another form.
    """
    if op_name(node) == "einsum":
        x, y, z, a, b = _einsum(node)
        if b is weights and a is not weights:
            x, y, a, b = y, x, b, a
        if a is not weights or len(set(x)) != 4 or x[2] in y or x[3] not in y or x[3] in z:
            raise Unrecognised(f"{node.name}: einsum {node.args[0]!r} is not a product of weights and values")
        head_dim = next(iter(set(y) - set(x)), "")
        roles = {x[0]: "b", x[1]: "h", head_dim: "d"}
        return Product(node, (a, "bhlk"), (b, _named(y, {**roles, x[3]: "l"})), _named(z, {**roles, x[2]: "l"}))
    first, v = node.args[:2]
    if first is not weights:
        raise Unrecognised(f"{node.name}: attention weights are the second operand")
    _check_rank(node, weights, v)  # type: ignore[arg-type]
    return Product(node, (weights, "bhlk"), (v, "bhld"), "bhld")  # type: ignore[arg-type]


def _check_rank(node: fx.Node, a: fx.Node, b: fx.Node) -> None:
    ranks = [t.dim() if (t := tensor_of(x)) is not None else None for x in (a, b)]
    if ranks != [4, 4]:
        raise Unrecognised(f"{node.name}: a product of tensors of rank {ranks}, not [batch, heads, ., .]")


def _einsum(node: fx.Node) -> tuple[str, str, str, fx.Node, fx.Node]:
    """(first letters, second letters, result letters, first, second)"""
    equation, operands = node.args[0], node.args[1:]
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    text = str(equation).replace(" ", "")
    left, arrow, z = text.partition("->")
    letters = left.split(",")
    plain = arrow and len(operands) == len(letters) == 2 and all(len(s) == 4 and s.isalpha() for s in (*letters, z))
    if not plain or any(len(set(s)) != 4 for s in (*letters, z)):
        raise Unrecognised(f"{node.name}: einsum {equation!r} is not of two tensors of rank 4")
    return letters[0], letters[1], z, operands[0], operands[1]  # type: ignore[return-value]


def _named(letters: str, roles: dict[str, str]) -> str:
    if set(letters) != set(roles):
        raise Unrecognised(f"einsum term {letters!r} is not one of batch, heads, length and head dim")
    return "".join(roles[c] for c in letters)


def _before_transpose(x: fx.Node) -> fx.Node | None:
    """k where `x` is k with its last two dimensions swapped."""
    while op_name(x) in ("contiguous", "clone"):
        x = x.args[0]  # type: ignore[assignment]
    name = op_name(x)
    if name == "transpose" and {arg(x, n, f"dim{n - 1}") % 4 for n in (1, 2)} == {2, 3}:
        return x.args[0]  # type: ignore[return-value]
    if name == "mT" or (name == "getattr" and x.args[1] == "mT"):
        return x.args[0]  # type: ignore[return-value]
    if name == "permute":
        dims = x.args[1] if isinstance(x.args[1], (tuple, list)) else x.args[1:]
        return x.args[0] if [d % 4 for d in dims] == [0, 1, 3, 2] else None  # type: ignore[union-attr,operator,return-value]
    return None
