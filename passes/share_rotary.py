"""For Inductor: sines and cosines of positions are computed once a graph.

Inductor fuses a pointwise operation into each of its readers. Every layer reads the same sines and cosines, so each would
compute them again for every query and key element. A layer compiled by itself gets them as inputs.
"""

from __future__ import annotations

import torch
import torch.fx as fx

from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.passes.facts.names import op_name, tensor_of

FEW_ROWS = 16  # a decode step's are cheaper to compute again than to launch a kernel for
_ON_THE_WAY = frozenset({"mul", "to", "type_as"})  # between a cosine and what layers read


def share_rotary(graph: fx.Graph) -> int:
    """Put a `tsa::materialize` behind each sine and cosine with several readers. Returns how many."""
    shared = 0
    for node in list(graph.nodes):
        if op_name(node) not in ("cos", "sin"):
            continue
        while len(node.users) == 1 and op_name(user := next(iter(node.users))) in _ON_THE_WAY:
            node = user
        value = tensor_of(node)
        if len(node.users) < 2 or value is None or value.dim() < 2 or _few(value.shape[-2]):
            continue
        with graph.inserting_after(node):
            copy = graph.call_function(torch.ops.tsa.materialize.default, (node,))
        copy.meta = dict(node.meta)
        node.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)
        shared += 1
    return shared


def _few(rows: object) -> bool:
    return isinstance(rows, int) and rows <= FEW_ROWS
