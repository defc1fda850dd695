"""Pass 1: write out `multi_head_attention_forward`, which Dynamo keeps as one call, so that its attention can be found.

`nn.MultiheadAttention` and all that is built on it (`nn.TransformerEncoder`, torchvision's ViT) come as this call. It becomes the
projections and the SDPA that the function itself runs (torch/nn/functional.py). A call with dropout or gradients, one whose
attention weights are used, or one with arguments that few models give, stays as it is, and `find_attention` warns.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F

from tsa_compile.passes.context import Context
from tsa_compile.passes.emit import describe_new
from tsa_compile.passes.facts.names import is_getitem, op_name, source, tensor, tensor_of

_FRESH = ("zeros", "zeros_like", "new_zeros", "full", "full_like", "new_full")
_UNUSUAL = ("bias_k", "bias_v", "add_zero_attn", "static_k", "static_v")


def expand_attention(context: Context) -> int:
    """Expand every call that can be, and write masks out of place; returns how many calls."""
    graph = context.gm.graph
    for node in graph.nodes:
        _fill_out_of_place(node)
    calls = [n for n in graph.nodes if n.target is F.multi_head_attention_forward]
    expanded = sum(_expand(graph, node) for node in calls)
    context.gm.recompile()
    return expanded


def _fill_out_of_place(node: fx.Node) -> None:
    """`zeros_like(x).masked_fill_(hidden, -inf)`, as PyTorch makes masks of numbers, without a write that proofs must respect."""
    if node.op != "call_method" or node.target != "masked_fill_" or op_name(node.args[0]) not in _FRESH:
        return
    if set(source(node).users) == {node}:
        node.target = "masked_fill"


def _expand(graph: fx.Graph, node: fx.Node) -> bool:
    given = inspect.signature(F.multi_head_attention_forward).bind(*node.args, **node.kwargs)
    given.apply_defaults()
    outputs = [u for u in node.users if is_getitem(u) and u.args[1] == 0]
    if len(outputs) != 1 or len(node.users) != 1 or not _plain(given.arguments):
        return False
    output = outputs[0]
    example = tensor_of(output)
    if example is None or example.requires_grad:
        return False
    with graph.inserting_before(output):
        before = output.prev
        result = _Writer(graph, given.arguments).write()
    while before.next is not output:
        before = before.next
        describe_new(before, output)
    output.replace_all_uses_with(result)
    for dead in (output, node):
        graph.erase_node(dead)
    return True


def _plain(a: Mapping[str, Any]) -> bool:
    """Is it what `_Writer` writes: batched, no dropout, masks of two dimensions?"""
    q, mask, padding = (tensor_of(a[name]) for name in ("query", "attn_mask", "key_padding_mask"))
    if any(a[name] is not None and a[name] is not False for name in _UNUSUAL) or (a["training"] and a["dropout_p"]):
        return False
    return q is not None and q.dim() == 3 and all(t is None or t.dim() == 2 for t in (mask, padding))


class _Writer:
    """Emits the operations of one call at the graph's insertion point."""

    def __init__(self, graph: fx.Graph, arguments: Mapping[str, Any]) -> None:
        self.graph, self.a, self.heads = graph, arguments, arguments["num_heads"]

    def _do(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(function, args, kwargs)

    def write(self) -> fx.Node:
        """[L, N, E], as the function returns it first."""
        heads = [self._heads(x) for x in self._projected()]
        causal = bool(self.a["is_causal"]) and self.a["key_padding_mask"] is None and not self.a["need_weights"]
        mask = None if causal else self._mask()
        scale = 1 / math.sqrt(self.a["embed_dim_to_check"] // self.heads)
        attention = torch._C._nn.scaled_dot_product_attention
        out = self._do(attention, *heads, attn_mask=mask, dropout_p=0.0, is_causal=causal, scale=scale)
        out = self._do(torch.flatten, self._do(torch.permute, out, (2, 0, 1, 3)), 2)
        return self._do(F.linear, out, self.a["out_proj_weight"], self.a["out_proj_bias"])

    def _projected(self) -> list[fx.Node]:
        """Query, key and value after their projections."""
        inputs = [self.a[name] for name in ("query", "key", "value")]
        packed, bias, width = self.a["in_proj_weight"], self.a["in_proj_bias"], self.a["embed_dim_to_check"]
        if self.a["use_separate_proj_weight"]:
            weights = [self.a[f"{name}_proj_weight"] for name in "qkv"]
        elif inputs[0] is inputs[1] is inputs[2]:
            together = self._do(torch.chunk, self._do(F.linear, inputs[0], packed, bias), 3, -1)
            return [self._do(operator.getitem, together, n) for n in range(3)]
        else:
            weights = [self._do(torch.narrow, packed, 0, n * width, width) for n in range(3)]
        biases = [None if bias is None else self._do(torch.narrow, bias, 0, n * width, width) for n in range(3)]
        return [self._do(F.linear, x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]

    def _heads(self, x: fx.Node) -> fx.Node:
        """[L, N, E] -> [N, H, L, D]"""
        return self._do(torch.permute, self._do(torch.unflatten, x, -1, (self.heads, -1)), (1, 2, 0, 3))

    def _mask(self) -> fx.Node | None:
        """What is added to the scores, from a mask `[L, S]` and a padding mask `[N, S]`; in both true hides."""
        mask, padding = (None if self.a[n] is None else self._bias(self.a[n]) for n in ("attn_mask", "key_padding_mask"))
        if padding is None:
            return mask
        padding = self._do(torch.unsqueeze, self._do(torch.unsqueeze, padding, 1), 1)
        return padding if mask is None else self._do(torch.add, padding, mask)

    def _bias(self, mask: fx.Node) -> fx.Node:
        if tensor(mask).dtype != torch.bool:
            return mask
        zeros = self._do(torch.zeros_like, mask, dtype=tensor(self.a["query"]).dtype)
        return self._do(torch.masked_fill, zeros, mask, -math.inf)
