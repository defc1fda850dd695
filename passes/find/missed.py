"""Say what was seen where a graph evidently computes attention and none was found."""

from __future__ import annotations

import re
from collections import Counter

import torch.fx as fx

from tsa_compile.passes.facts.names import module_path, op_name, tensor_of

_PRODUCTS = ("matmul", "einsum", "baddbmm")


def missed_attention(graph: fx.Graph) -> list[str]:
    """For each module, or line of code, that calls itself attention and multiplies computed tensors: what it multiplies."""
    seen: Counter[tuple[str, str]] = Counter()
    for node in graph.nodes:
        if op_name(node) in _PRODUCTS and _of_activations(node):
            seen[module_path(node) or _code_line(node), op_name(node)] += 1
    named = {key: n for key, n in seen.items() if re.search("attn|attention", key[0], re.IGNORECASE)}
    return [f"{where}: {n} {name}, but no attention around it in this graph" for (where, name), n in named.items()]


def _code_line(node: fx.Node) -> str:
    """The innermost line of code that made the node; what is left where a frame begins inside the module."""
    lines = [x.strip() for x in (node.meta.get("stack_trace") or "").splitlines()]
    return next((x for x in reversed(lines) if x.strip("^~ ")), "")


def _of_activations(product: fx.Node) -> bool:
    """Are two operands computed, of three dimensions or more?"""
    computed = [x for x in product.all_input_nodes if x.op != "placeholder" and x.op != "get_attr"]
    return sum(t is not None and t.dim() >= 3 for t in map(tensor_of, computed)) >= 2
