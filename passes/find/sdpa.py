"""Recognise `scaled_dot_product_attention`, in Dynamo graphs and in ATen graphs."""

from __future__ import annotations

import math
from typing import Any

import torch.fx as fx

from tsa_compile.passes.facts.names import Unreadable, arg, number_of, op_name, tensor, tensor_of
from tsa_compile.passes.find.match import Layouts, Match
from tsa_compile.passes.prove_mask.source import MaskSource


def match_sdpa(node: fx.Node) -> Match | None:
    """The attention that an SDPA node computes; None for any other node.

    Raises:
        Unreadable: operands that are not [batch, heads, length, head_dim] or [batch, length, head_dim].
    """
    if op_name(node) != "scaled_dot_product_attention":
        return None
    q, k, v = (arg(node, n, name) for n, name in enumerate(("query", "key", "value")))
    ranks = [t.dim() if (t := tensor_of(x)) is not None else None for x in (q, k, v)]
    if ranks not in ([4, 4, 4], [3, 3, 3]):
        raise Unreadable(f"SDPA with operands of rank {ranks}, not [batch, heads, length, head_dim]")
    layout = "bhld" if ranks[0] == 4 else "bld"
    mask, is_causal = arg(node, 3, "attn_mask"), arg(node, 5, "is_causal", False)
    sources = []
    if is_causal is True:
        sources.append(MaskSource("causal"))
    if mask is not None:
        sources.append(MaskSource("mask", mask))
    scale = _scale(node.kwargs.get("scale"), q)
    return Match(node, "sdpa", q, k, v, scale, tuple(sources), node, Layouts(*[layout] * 4), _obstacle(node, is_causal))


def _obstacle(node: fx.Node, is_causal: Any) -> str | None:
    dropout = arg(node, 4, "dropout_p", 0.0)
    if not isinstance(dropout, (int, float)) or dropout != 0:
        return f"dropout_p={dropout}: dropout in training"
    return None if isinstance(is_causal, bool) else "is_causal is not a constant"


def _scale(scale: Any, q: fx.Node) -> float | None:
    if scale is None:
        head_dim = tensor(q).shape[-1]
        return 1.0 / math.sqrt(head_dim) if isinstance(head_dim, int) else None
    scale = number_of(scale)
    return float(scale) if isinstance(scale, (int, float)) and scale > 0 else None
