"""How well the pages of one layer serve a later one: the exact top pages of both, side by side (Kascade, arXiv 2512.16391)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tsa_compile.tools.evaluate.emulate_decode import DecodeText
from tsa_compile.tools.evaluate.emulate_model import Layer
from tsa_compile.tools.evaluate.emulate_outcome import best_pages, exact_output, page_masses
from tsa_compile.tools.evaluate.emulate_select import DecodeRule, Pages

Tensor = torch.Tensor


def overlap(text: DecodeText, keep: float, distances: Sequence[int]) -> dict[int, dict[str, float]]:
    """{distance in global layers: what reading the list of the layer so far before means}; each KV head reads the best one's.

    Of each: "found", the share of a layer's exact top pages that are the other's too, always-read pages left out; "mass", the
    softmax mass that the other's pages hold, over the mass of its own; "worst", the smallest such mass of any layer and head.
    """
    masses: dict[int, Tensor] = {}

    def attend(layer: Layer, local: bool) -> Tensor:
        if not local:
            masses[layer.index] = torch.stack([page_masses(layer, g) for g in range(layer.k.shape[0])])
        return exact_output(layer)

    text.decode(attend)
    every = list(masses.values())
    pages = Pages.of(DecodeRule(), text.length, every[0].shape[1], every[0].device)
    count = (keep * pages.count).ceil()
    lists = [torch.stack([best_pages(m, pages, count) for m in heads]) for heads in every]
    result = {}
    for distance in distances:
        pairs = [_pair(lists[i - distance], lists[i], every[i], pages) for i in range(distance, len(every))]
        if not pairs:
            continue
        found, mass = (torch.cat(x) for x in zip(*pairs, strict=True))
        result[distance] = {"found": found.mean().item(), "mass": mass.mean().item(), "worst": mass.min().item()}
    return result


def _pair(anchor: Tensor, own: Tensor, mass: Tensor, pages: Pages) -> tuple[Tensor, Tensor]:
    """(share of own pages found, mass over that of own pages) of each head [Hk], by the anchor's head that has most mass.

    Args:
        anchor, own: bool [Hk, n, P]. mass: [Hk, n, P].
    """
    always = (mass * pages.forced).sum(-1)  # [Hk, n]
    held = torch.einsum("hnp,anp->hna", mass, anchor.float()) + always[..., None]
    ratio = (held / ((mass * own).sum(-1) + always)[..., None]).mean(1)  # [Hk, anchor heads]
    best = ratio.max(-1)
    both = (anchor[best.indices] & own).sum(-1) / own.sum(-1).clamp_min(1)
    return both.mean(-1), best.values
