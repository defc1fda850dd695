"""One attention as a graph of its own, without a trace: what a policy lowers to, for any lengths."""

from __future__ import annotations

import torch
import torch.fx as fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from tsa_compile.passes.decide import dense_reason
from tsa_compile.passes.site import AttentionSite, KeyTerm, MaskFacts
from tsa_compile.policies.base import Policy

Tensor = torch.Tensor


class SiteGraph:
    """What `policy` makes of one attention; `reason` says why it refuses, or is None.

    Args:
        policy: the layer's policy.
        layer: its number.
        shape: query heads, KV heads, head dim, head dim of the values.
        dtype: of all operands.
        padded: whether a key mask comes with each call.
        causal: causal, or bidirectional.
        scale: factor of the scores.
    """

    def __init__(
        self,
        policy: Policy,
        layer: int,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        padded: bool,
        causal: bool,
        scale: float,
    ) -> None:
        graph = fx.Graph()
        q, k, v, mask, out = _placeholders(graph, shape, dtype)
        facts = MaskFacts(causal, key_mask=(KeyTerm(mask, (("batch", 0), ("key", 0))),) if padded else ())
        site = AttentionSite(out, "sdpa", q, k, v, scale, facts, None, layer, "", layer)
        self.reason = dense_reason(site, policy) or policy.refuse(site)
        if self.reason is None:
            graph.output(policy.lower(graph, site))
            graph.erase_node(out)
            self._module = fx.GraphModule({}, graph)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """`[B, H, Lq, D]`, `[B, Hk, Lk, D]`, `[B, Hk, Lk, Dv]`, bool `[B, Lk]` -> `[B, H, Lq, Dv]`"""
        return self._module(q, k, v, key_mask)  # type: ignore[no-any-return]


def _placeholders(graph: fx.Graph, shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[fx.Node]:
    """q, k, v, key mask and the output that is replaced, with example values of symbolic batch and lengths."""
    heads, kv_heads, dim, v_dim = shape
    batch, q_len, k_len = 5, 1021, 2039  # hints only; the sizes are symbols
    mode = FakeTensorMode(shape_env=ShapeEnv())
    shapes = {
        "q": (batch, heads, q_len, dim),
        "k": (batch, kv_heads, k_len, dim),
        "v": (batch, kv_heads, k_len, v_dim),
        "key_mask": (batch, k_len),
        "out": (batch, heads, q_len, v_dim),
    }
    nodes = []
    for name, sizes in shapes.items():
        real = torch.empty(sizes, dtype=torch.bool if name == "key_mask" else dtype, device="meta")
        dynamic = [DimDynamic.DUCK if s in (batch, q_len, k_len) else DimDynamic.STATIC for s in sizes]
        node = graph.placeholder(name)
        node.meta["val"] = mode.from_tensor(real, symbolic_context=StatelessSymbolicContext(dynamic))
        nodes.append(node)
    return nodes
