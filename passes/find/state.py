"""What the cache keeps beside the keys of an attention: tensors that the graph brings up to date before the attention reads."""

from __future__ import annotations

import torch
import torch.fx as fx

from tsa_compile.passes.context import GraphSite
from tsa_compile.passes.operands import LAYOUT

_KEPT = {  # operator -> the names of its first arguments, the state; the keys are the next one
    torch.ops.tsa.append_pages.default: ("sums", "counts"),
    torch.ops.tsa.attach_state.default: ("seed",),
    torch.ops.tsa.crop_list.default: ("since", "begin", "listed_counts", "listed"),
}


def state_of(graph: fx.Graph, at: GraphSite) -> dict[str, fx.Node] | None:
    """The state of the buffer that is the site's keys, by name; None: the graph keeps none.

    A cache layer's `update` writes it right after the new rows, so the node stands before every reader of the keys.
    """
    match = at.match
    if match.layouts.k != LAYOUT or at.mask.keys_used is not None:
        return None
    found: dict[str, fx.Node] = {}
    for node in graph.nodes:
        if node is at.node:
            break
        names = _KEPT.get(node.target)
        if names is not None and node.args[len(names)] is match.k:
            found.update(zip(names, node.args, strict=False))
    return found or None
