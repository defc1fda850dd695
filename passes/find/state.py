"""What the cache keeps beside the keys of an attention: tensors that the graph brings up to date before the attention reads."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from tsa_compile.passes.context import GraphSite
from tsa_compile.passes.operands import LAYOUT

_KEPT = {  # operator -> the names of its first arguments, the state; the keys are the next one
    torch.ops.tsa.append_pages.default: ("sums", "counts"),
    torch.ops.tsa.append_basis.default: ("basis", "coords", "scales"),
    torch.ops.tsa.append_projected.default: ("index", "positions", "counts", "query", "key", "frequencies"),
    torch.ops.tsa.append_teams.default: ("teams",),
    torch.ops.tsa.attach_state.default: ("seed",),
    torch.ops.tsa.crop_list.default: ("since", "begin", "listed_counts", "listed"),
}
_OF_VALUES = {torch.ops.tsa.append_pages.default: ("value_sums", "value_counts")}  # the same, where the values are the next one
_TOLD = {torch.ops.tsa.append_projected.default: {"interleaved": 13, "factor": 14}}  # numbers among the other arguments


def state_of(graph: fx.Graph, at: GraphSite) -> dict[str, Any] | None:
    """The state of the buffers that are the site's keys and values, nodes and numbers by name; None: the graph keeps none.

    A cache layer's `update` writes it right after the new rows, so the node stands before every reader of the keys.
    """
    match = at.match
    if match.layouts.k != LAYOUT or at.mask.keys_used is not None:
        return None
    found: dict[str, Any] = {}
    for node in graph.nodes:
        if node is at.node:
            break
        for kept, buffer, layout in ((_KEPT, match.k, match.layouts.k), (_OF_VALUES, match.v, match.layouts.v)):
            names = kept.get(node.target)
            if names is not None and node.args[len(names)] is buffer and layout == LAYOUT:
                found.update(zip(names, node.args, strict=False))
                found.update({name: node.args[n] for name, n in _TOLD.get(node.target, {}).items()})
    return found or None
