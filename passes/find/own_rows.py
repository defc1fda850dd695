"""Steps over a cache of ours that say themselves which keys each of their rows sees: `tsa::attach_rows`, in place of a proof."""

from __future__ import annotations

import torch
import torch.fx as fx

from tsa_compile.passes.facts.graph_facts import GraphFacts
from tsa_compile.passes.find.match import Match
from tsa_compile.passes.operands import LAYOUT
from tsa_compile.passes.prove_mask.proven import ProvenMask


def mask_of_rows(match: Match, facts: GraphFacts) -> ProvenMask | None:
    """What the layer's `update` says of the mask; None: it says nothing of this one.

    Only layers on fixed buffers call the operator (`cache/pinned.py`), with the mask that they made and the session passes on.
    """
    if match.layouts.k != LAYOUT or len(match.sources) != 1 or match.sources[0].kind != "mask":
        return None
    mask = match.sources[0].mask
    for node in match.node.graph.nodes:
        if node is match.node:
            return None
        if node.target is torch.ops.tsa.attach_rows.default and node.args[2] is mask and node.args[4] is match.k:
            _, lengths, _, start, _ = node.args
            assert isinstance(lengths, fx.Node)
            assert start is None or isinstance(start, fx.Node)
            return ProvenMask(causal=True, rows=(start, lengths)) if mask not in facts.written else None
    return None
