"""Recognise `flex_attention`, to say why it stays as it is."""

from __future__ import annotations

import torch.fx as fx

from tsa_compile.passes.facts.names import arg, is_getitem, op_name, source, tensor_of
from tsa_compile.passes.find.match import Match

_OBSTACLE = "flex attention: which keys are seen is said by a function and by blocks that are data"


def match_flex(node: fx.Node) -> Match | None:
    """The output of a flex attention over [batch, heads, length, head_dim]; None for any other node."""
    if not is_getitem(node) or node.args[1] != 0 or op_name(source(node)) != "flex_attention":
        return None
    call = source(node)
    q, k, v = (arg(call, n, name) for n, name in enumerate(("query", "key", "value")))
    if any((t := tensor_of(x)) is None or t.dim() != 4 for x in (q, k, v)):
        return None
    return Match(node, "flex", q, k, v, 1.0, (), call, obstacle=_OBSTACLE)
