"""Masks of a few query rows as the tensors that they are, where nothing can be proven of them: decode reads them as it goes."""

from __future__ import annotations

import torch

from tsa_compile.passes.facts.graph_facts import GraphFacts
from tsa_compile.passes.facts.names import tensor_of
from tsa_compile.passes.find.match import Match
from tsa_compile.passes.prove_mask.prove import MaskProver
from tsa_compile.passes.prove_mask.source import MaskSource
from tsa_compile.passes.site import VERIFY_ROWS, Size

Shape = tuple[Size, Size, Size, Size]  # batch, heads, q_len, k_len


def masks_as_data(match: Match, shape: Shape, masks: MaskProver, facts: GraphFacts) -> tuple[MaskSource, ...] | None:
    """All that masks the scores, if one tensor `[B or 1, H or 1, Lq or 1, Lk]` can say it: bool, or numbers that are added.

    None: it cannot, the graph writes to one of the masks, or the rows are not so few.
    """
    few = isinstance(shape[2], int) and shape[2] <= VERIFY_ROWS
    usable = all(_is_usable(source, match, shape, masks, facts) for source in match.sources)
    return match.sources if few and match.sources and usable else None


def _is_usable(source: MaskSource, match: Match, shape: Shape, masks: MaskProver, facts: GraphFacts) -> bool:
    has_heads = "h" in match.layouts.q
    example = None if source.mask is None else tensor_of(source.mask)
    if example is None or source.mask in facts.written or example.dim() > (4 if has_heads or source.split else 3):
        return False
    if source.split is not None and not _can_be_merged(example, source.split, facts):
        return False
    if source.kind in ("show", "hide"):
        return example.dtype == torch.bool and masks.hides(source, shape, has_heads or source.split is not None)
    return example.is_floating_point() or (source.kind == "mask" and example.dtype == torch.bool)


def _can_be_merged(example: torch.Tensor, split: tuple[Size, Size], facts: GraphFacts) -> bool:
    """Are batch and heads known, so that a mask of both can be one of `[batch * heads, 1, ., .]`?"""
    batch, heads = split
    has_batch = example.dim() == 4 and facts.sizes.same(example.shape[0], batch)
    return isinstance(heads, int) and (has_batch or isinstance(batch, int))
