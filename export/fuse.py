"""Two operators -> one: deployment targets get `tsa::token_sparse_attention`, one node with one output."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
import torch.fx as fx
from torch._ops import OpOverload

from tsa_compile.export.common import ExportError
from tsa_compile.passes.facts.names import SHAPE_READERS, describe, op_name, tensor_of


def fuse_selection(gm: fx.GraphModule) -> list[fx.Node]:
    """Replace each `select_tokens` + `sparse_attention` pair by `token_sparse_attention`, in place; returns the nodes.

    Raises:
        ExportError: a `sparse_attention` reads a selection made from other operands (shared between layers): one node cannot
            express it. Or a mask hides keys whose own rows may be read: the node zeroes them. Or the heads of a group share a
            selection (`share="group"`), or attention among the kept tokens is block-sparse (`inner`).
    """
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.tsa.token_block_attention.default):
        raise ExportError(f"{node.name}: TokenSparse.inner is a BlockSparse; this export takes only inner=None")
    fused = []
    for node in list(gm.graph.find_nodes(op="call_function", target=torch.ops.tsa.sparse_attention.default)):
        call = _arguments(node)
        selection = _selection(node, call)
        chosen = _arguments(selection)
        if chosen["share"] != "head":
            raise ExportError(
                f"{node.name}: TokenSparse.share is {chosen['share']!r}; this export takes 'head', tokens of each head's own"
            )
        for name in ("q", "k", "order", "ranks", "scale"):
            if chosen[name] is not call[name] and chosen[name] != call[name]:
                raise ExportError(f"{node.name}: its tokens were selected with another {name} ({selection.name})")
        if call["need_lse"]:
            raise ExportError(f"{node.name}: its log-sum-exp is read; exports take the attention's output alone")
        chosen["key_mask"] = _key_mask(call["order"])
        if chosen["key_mask"] is not None:
            _check_padding(chosen["key_mask"], node.name)
        order = ["q", "k", "v", "key_mask", "scale", "coverage", "window", "pool", "min_tokens"]
        order += ["strip_window", "strip_sinks", "heavy", "engine"]
        with gm.graph.inserting_before(node):
            one = gm.graph.call_function(
                torch.ops.tsa.token_sparse_attention.default, tuple({**chosen, **call}[name] for name in order)
            )
        for out in list(node.users):  # (out, lse), of which the second is read by nobody
            if out.args[1] == 0:
                one.meta = dict(out.meta)
                out.replace_all_uses_with(one)
            gm.graph.erase_node(out)
        gm.graph.erase_node(node)
        fused.append(one)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return fused


def refuse_other_operators(gm: fx.GraphModule, policies: Iterable[str]) -> None:
    """Raise an ExportError if the graph holds an operator of ours that no deployment target knows.

    Args:
        policies: names of the policies, other than TokenSparse, that were applied; for the message.
    """
    for node in gm.graph.nodes:
        name = node.target.name() if isinstance(node.target, OpOverload) else ""
        if name.startswith("tsa::") and node.target is not torch.ops.tsa.token_sparse_attention.default:
            others = f", not {', '.join(sorted(policies))}" if policies else ""
            raise ExportError(f"{node.name}: this export takes the policy TokenSparse{others}; it has no form of {name}")


def _selection(node: fx.Node, call: dict[str, Any]) -> fx.Node:
    """The `select_tokens` node whose three outputs `node` reads."""
    sources: list[fx.Node] = []
    for position, name in enumerate(("indices", "counts", "heavy_indices")):
        item = call[name]
        if not isinstance(item, fx.Node) or item.target is not operator.getitem or item.args[1] != position:
            raise ExportError(f"{node.name}: {name} is not output {position} of a tsa::select_tokens node")
        sources += item.all_input_nodes
    first = sources[0]
    if any(s is not first for s in sources) or first.target is not torch.ops.tsa.select_tokens.default:
        raise ExportError(f"{node.name}: indices, counts and heavy_indices come from different selections")
    return first


def _key_mask(order: fx.Node | None) -> fx.Node | None:
    """The mask whose view the operators read: `order` is the first output of a `key_view` node."""
    return None if order is None else order.all_input_nodes[0].all_input_nodes[0]


def _check_padding(key_mask: fx.Node, name: str) -> None:
    """Raise unless the hidden keys look like padding, the rows of which nobody reads: an input of the graph says which they are.

    A pattern of the program or the layer's own activations hide tokens that live on.
    """
    inputs, stack, seen = 0, [key_mask], {key_mask}
    why = f"{name}: its mask hides keys by {{}}, and this export leaves their own rows zero; use Dense for it"
    while stack:
        x = stack.pop()
        example = tensor_of(x)
        if example is not None and example.is_floating_point() and example.dim() > 2:
            raise ExportError(why.format(f"activations ({describe(x)})"))
        inputs += example is not None and x.op in ("placeholder", "get_attr")
        new = [y for y in x.all_input_nodes if y not in seen and op_name(x) not in SHAPE_READERS]
        seen.update(new)
        stack += new
    if not inputs:
        raise ExportError(why.format("a fixed pattern"))


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments by name, defaults filled in."""
    assert isinstance(node.target, OpOverload)
    arguments = node.target._schema.arguments
    values: dict[str, Any] = {a.name: a.default_value for a in arguments if a.has_default_value()}
    values.update({a.name: value for a, value in zip(arguments, node.args, strict=False)})
    return {**values, **node.kwargs}
