"""Whether the projected keys that a cache keeps beside a site's keys are those of a rotation that the graph has."""

from __future__ import annotations

import operator
from typing import Any

import torch.fx as fx

from tsa_compile.kernels.types import Rotation
from tsa_compile.passes.context import Context, GraphSite
from tsa_compile.passes.find.rope import NotRotated
from tsa_compile.passes.find.state import state_of
from tsa_compile.passes.prove_mask.patterns import Unchanged

_NO_STATE = "no projected keys: the cache keeps none for this step, or the plan has no weights of an index for this attention"


def why_not_projected(context: Context, at: GraphSite) -> str | None:
    """Why the site has no keys before rotation to go by; None: it has, by the rotation of its own queries and keys."""
    state = state_of(context.gm.graph, at)
    if state is None or "index" not in state:
        return _NO_STATE
    kept = _rotation_of(context, state)
    if kept is None:
        return "the frequencies of the index are no constant of the graph"
    for name, x in (("queries", at.match.q), ("keys", _written(context.gm.graph, at))):
        if x is None:
            return "no rows are written into the site's keys, so that their rotation is not known"
        try:
            found, positions = context.rotations.of(x)
        except NotRotated as why:
            return f"{name} before rotation are not known: {why}"
        if not ("position_ids" in positions.name or positions.name.endswith("pinned_offset")):
            return f"{name} are rotated by positions from {positions}, which are not those that the cache was told"
        if not _same(found, kept):
            return f"{name} are rotated in another way than when the index was learned"
    read = {*context.rotations.read, state["frequencies"].name}
    context.patterns |= dict.fromkeys(read, Unchanged())
    return None


def _rotation_of(context: Context, state: dict[str, Any]) -> Rotation | None:
    frequencies = context.constants.get(state["frequencies"].name)
    if frequencies is None:
        return None
    return Rotation(tuple(frequencies.tolist()), state["interleaved"], state["factor"])


def _written(graph: fx.Graph, at: GraphSite) -> fx.Node | None:
    """The new rows of the buffer that is the site's keys."""
    found = None
    for node in graph.nodes:
        if node is at.node:
            break
        if node.target is operator.setitem and node.args[0] is at.match.k and isinstance(node.args[2], fx.Node):
            found = node.args[2]
    return found


def _same(a: Rotation, b: Rotation) -> bool:
    """To float32, in what is rotated."""
    longest = max(len(a.frequencies), len(b.frequencies))
    if (not a.interleaved or not b.interleaved) and len(a.frequencies) != len(b.frequencies):
        return False
    x, y = (list(r.frequencies) + [0.0] * (longest - len(r.frequencies)) for r in (a, b))
    near = all(abs(f - g) <= 1e-7 + 2e-6 * abs(g) for f, g in zip(x, y, strict=True))
    return near and a.interleaved == b.interleaved and abs(a.factor - b.factor) <= 1e-3
