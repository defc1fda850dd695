"""Why no policy may touch a site, whatever its mask: operands, gradients, dtypes."""

from __future__ import annotations

import sympy
import torch
import torch.fx as fx
from torch._subclasses import FakeTensor

from tsa_compile.passes.facts.names import op_name, tensor, tensor_of
from tsa_compile.passes.facts.sizes import SizeProver, known_size
from tsa_compile.passes.find.match import Match

_PLAIN = (torch.Tensor, torch.nn.Parameter, FakeTensor)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def obstacle_of(match: Match, sizes: SizeProver) -> str | None:
    """The first obstacle, or None."""
    named = {"query": match.q, "key": match.k, "value": match.v, "output": match.node}
    return _tensors(named) or _gradients(match) or _dtypes(match) or _shapes(match, sizes)


def _tensors(named: dict[str, fx.Node]) -> str | None:
    for name, node in named.items():
        example = tensor_of(node)
        if example is None:
            return f"{name} {node.name} has no example value"
        if type(example) not in _PLAIN:
            return f"{name} is a {type(example).__name__}: tensor subclasses are left alone"
        if torch._C._functorch.is_functorch_wrapped_tensor(example):
            return f"{name} is batched by torch.vmap or another function transform: its operands have a hidden dimension"
        if example.dtype not in _DTYPES:
            return f"{name} is {example.dtype}"
    return None


def _gradients(match: Match) -> str | None:
    """The output of a graph traced with gradients on requires one if any input does."""
    if tensor(match.node).requires_grad:
        return "inputs require gradients: run under torch.no_grad() or torch.inference_mode()"
    return None


def _dtypes(match: Match) -> str | None:
    dtypes = {str(tensor(x).dtype).removeprefix("torch.") for x in (match.q, match.k, match.v, match.node)}
    if len(dtypes) > 1 and not in_autocast(match.node):
        return f"mixed dtypes {sorted(dtypes)}"
    return None


def in_autocast(node: fx.Node) -> bool:
    """Is the node in an autocast region, of the graph or around its call? There operands are cast to the output's dtype.

    Dynamo compiles anew where the region around a call changes.
    """
    if torch.is_autocast_enabled(tensor(node).device.type):
        return True
    depth = 0
    for other in node.graph.nodes:
        if other is node:
            return depth > 0
        name = op_name(other)
        depth += (name == "_enter_autocast") - (name == "_exit_autocast")
    return False


def _shapes(match: Match, sizes: SizeProver) -> str | None:
    """[B, H, Lq, D], [B, Hk, Lk, D], [B, Hk, Lk, Dv] -> [B, H, Lq, Dv], Hk dividing H, in the site's layouts (some without H)."""
    heads, kv_heads = match.size("q", "h"), match.size("k", "h")
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or kv_heads == 0 or heads % kv_heads:
        return f"{heads} query heads do not divide into {kv_heads} key heads"
    q, k, v, out = (
        {"h": sympy.Integer(1), **{dim: known_size(tensor(x).shape[n]) for n, dim in enumerate(layout)}}
        for x, layout in (
            (match.q, match.layouts.q),
            (match.k, match.layouts.k),
            (match.v, match.layouts.v),
            (match.node, match.layouts.out),
        )
    )
    pairs = [(q["b"], k["b"]), (q["b"], v["b"]), (q["d"], k["d"]), (k["h"], v["h"])]
    pairs += [(out["b"], q["b"]), (out["h"], q["h"]), (out["l"], q["l"]), (out["d"], v["d"])]
    # Caches give keys and values symbols of their own. Any attention needs them equal: ours guards on it, and checks at run time.
    lengths_differ = sympy.expand(k["l"] - v["l"]).is_Integer and k["l"] != v["l"]
    if all(sizes.is_zero(a - b) for a, b in pairs) and not lengths_differ:
        return None
    shapes = [list(tensor(x).shape) for x in (match.q, match.k, match.v, match.node)]
    return f"shapes do not fit: query {shapes[0]}, key {shapes[1]}, value {shapes[2]}, output {shapes[3]}"
