"""Recognise `scaled_dot_product_attention` nodes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.fx as fx

from tsa_compile.passes.graph_names import argument, name_of, shape_of, value_of

TARGETS = (torch._C._nn.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)


@dataclasses.dataclass(frozen=True)
class Match:
    """Operands of an attention, before anything is proven about it."""

    node: fx.Node
    form: str
    q: fx.Node
    k: fx.Node
    v: fx.Node
    scale: float | None
    masks: tuple[tuple[str, fx.Node], ...]  # ("bool" | "hidden" | "add", node)
    is_causal: bool
    obstacle: str | None
    product: fx.Node | None = None  # q k^T, where the graph has it


def match_sdpa(node: fx.Node) -> Match | None:
    """The attention of an SDPA node; None for any other node."""
    if node.op != "call_function" or (node.target not in TARGETS and name_of(node) != "scaled_dot_product_attention"):
        return None
    q, k, v = (argument(node, i, n) for i, n in enumerate(("query", "key", "value")))
    mask, dropout = argument(node, 3, "attn_mask"), argument(node, 4, "dropout_p", 0.0)
    is_causal = argument(node, 5, "is_causal", False)
    scale = node.kwargs.get("scale")
    obstacle = None
    if dropout != 0.0:
        obstacle = f"dropout {dropout} is active"
    elif not isinstance(is_causal, bool):
        obstacle = "is_causal is not a constant"
    elif len(shape_of(q)) != 4 or len(shape_of(k)) != 4 or len(shape_of(v)) != 4:
        obstacle = f"operands are not [batch, heads, length, head_dim]: query has {len(shape_of(q))} dims"
    masks = () if mask is None else ((("bool" if value_of(mask).dtype == torch.bool else "add"), mask),)
    return Match(node, "sdpa", q, k, v, constant_scale(scale, q), masks, is_causal is True, obstacle)


def constant_scale(scale: Any, q: fx.Node) -> float | None:
    """The factor as a float; None given: 1 / sqrt(head_dim); None returned: not a constant of the graph."""
    if scale is None:
        dim = shape_of(q)[-1]
        return 1.0 / math.sqrt(int(dim)) if dim.is_number else None
    return float(scale) if isinstance(scale, (int, float)) and not isinstance(scale, bool) else None



