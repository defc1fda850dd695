"""Pass 1: find every attention of the graph and prove its mask. Changes nothing."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx

from tsa_compile.passes.find_manual import is_attention_softmax, match_manual
from tsa_compile.passes.find_sdpa import Match, match_sdpa
from tsa_compile.passes.graph_names import is_zero, shape_of, value_of
from tsa_compile.passes.mask_transfer import MaskReader
from tsa_compile.passes.mutation import Writes
from tsa_compile.passes.prove_mask import prove_masks, unproven
from tsa_compile.passes.repeat_kv import unrepeat
from tsa_compile.passes.site import AttentionSite

if TYPE_CHECKING:
    from tsa_compile.passes.pipeline import Context


def find_attention(context: Context) -> int:
    """Fill `context.sites`; returns how many there are. Unrecognised softmaxes become warnings."""
    unknown: list[str] = []
    reader = MaskReader(context.constants, Writes(context.gm.graph))
    for node in context.gm.graph.nodes:
        match = match_sdpa(node)
        if match is None and is_attention_softmax(node):
            match = match_manual(node, reader)
            if match is None:
                unknown.append(f"{node.name} {list(value_of(node).shape)} in {module_path(node) or 'the graph'}")
        if match is not None:
            context.sites.append(_site(match, len(context.sites), reader))
    if unknown:
        context.warnings.append(
            f"{len(unknown)} softmax(es) that may be attention were not recognised and stay as they are: "
            + "; ".join(unknown[:3])
            + ("; ..." if len(unknown) > 3 else "")
        )
    return len(context.sites)


def _site(match: Match, index: int, reader: MaskReader) -> AttentionSite:
    obstacle = match.obstacle or _obstacle(match)
    k, v = unrepeat(match.k), unrepeat(match.v)
    if obstacle is None and not _heads_fit(match.q, k, v):
        k, v = match.k, match.v
    if obstacle is None and not _heads_fit(match.q, k, v):
        obstacle = f"heads do not fit: q {_sizes(match.q)}, k {_sizes(k)}, v {_sizes(v)}"
    if obstacle is None and any(reader.writes.between(x, _first(match), match.node) for x in (match.q, match.k, match.v)):
        obstacle = "query, key or value is written in place while it attends"
    mask = unproven("not examined") if obstacle else prove_masks(list(match.masks), match.is_causal, match.q, match.k, reader)
    module = module_path(match.node)
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", module)
    layer = int(number.group(1)) if number else index
    return AttentionSite(
        match.node, match.form, match.q, k, v, match.scale or 0.0, mask, obstacle, index, module, layer
    )


def _first(match: Match) -> fx.Node:
    """The first node of the attention that reads an operand."""
    return match.node if match.product is None else match.product


def _obstacle(match: Match) -> str | None:
    """What keeps any policy off, apart from the mask."""
    if match.scale is None:
        return "scale is not a constant of the graph"
    if match.scale <= 0:
        return f"scale {match.scale} is not positive"
    for label, node in (("query", match.q), ("key", match.k), ("value", match.v)):
        value = value_of(node)
        if not isinstance(value, torch.Tensor):
            return f"{label} has no example value"
        if type(value) not in (torch.Tensor, torch.nn.Parameter, torch._subclasses.FakeTensor):
            return f"{label} is a {type(value).__name__}"
        if value.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            return f"{label} is {value.dtype}"
        if value.dtype != value_of(match.q).dtype:
            return f"query is {value_of(match.q).dtype}, {label} is {value.dtype}"
        if value.requires_grad and torch.is_grad_enabled():
            return "gradients are on: run under torch.no_grad()"
    return None


def _heads_fit(q: fx.Node, k: fx.Node, v: fx.Node) -> bool:
    (b, h, _, d), (kb, kh, kn, kd), (vb, vh, vn, _) = shape_of(q), shape_of(k), shape_of(v)
    same = all(is_zero(x - y) for x, y in ((b, kb), (b, vb), (d, kd), (kh, vh), (kn, vn)))
    return same and h.is_number and kh.is_number and h % kh == 0


def _sizes(node: fx.Node) -> list[Any]:
    return list(value_of(node).shape)


def module_path(node: fx.Node) -> str:
    """The path of the innermost module a node was traced in, such as "model.layers.3.self_attn"."""
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for entry in stack.values():
        path = entry[0] if isinstance(entry, tuple) else path
    path = re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", path)  # L['self']._modules['model'] -> L.self._modules.model
    parts = [p for p in path.split(".") if p not in ("", "L", "self", "_modules", "orig_mod", "_orig_mod", "G")]
    return ".".join(parts)
