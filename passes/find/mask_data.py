"""The mask of a few query rows as the tensor that it is, where nothing can be proven of it: decode reads it as it goes."""

from __future__ import annotations

import torch
import torch.fx as fx

from tsa_compile.passes.facts.graph_facts import GraphFacts
from tsa_compile.passes.facts.names import tensor_of
from tsa_compile.passes.find.match import Match
from tsa_compile.passes.site import VERIFY_ROWS, Size


def mask_as_data(match: Match, k_len: Size, facts: GraphFacts) -> fx.Node | None:
    """A tensor `[B or 1, H or 1, Lq or 1, Lk]` that says all that masks the scores: bool, or numbers that are added to them.

    None: there is no one such tensor, the graph writes to it, or the rows are not so few.
    """
    q_len = match.size("q", "l")
    if len(match.sources) != 1 or "h" not in match.layouts.q or not isinstance(q_len, int) or q_len > VERIFY_ROWS:
        return None
    (source,) = match.sources
    mask = source.mask
    example = None if mask is None else tensor_of(mask)
    if example is None or example.dim() != 4 or not facts.sizes.same(example.shape[3], k_len):
        return None
    added = source.kind in ("mask", "add") and example.is_floating_point() and source.factor == 1.0
    shown = source.kind == "mask" and example.dtype == torch.bool
    return mask if (added or shown) and mask not in facts.written else None
