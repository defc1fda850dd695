"""Variants of the launches that make lists of pages, for `tsa-compile bench decode --sweep select`: one by bins, and two."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from tsa_compile.kernels.select.top_pages import bins_host, host
from tsa_compile.kernels.select.top_pages.budget import list_capacity
from tsa_compile.kernels.select.top_pages.host import CONFIG, ListConfig
from tsa_compile.tools.bench.decode_cases import RECENT, SINKS, Buffers, DecodeCase

Tensor = torch.Tensor
Lists = tuple[Tensor, Tensor]
Select = Callable[[Buffers, Lists], Lists]  # of a layer's buffers and (logits, parts)
VARIANTS = (
    CONFIG,
    *(CONFIG._replace(warps=n) for n in (4, 16)),
    *(CONFIG._replace(tile=tile, share_warps=warps) for tile, warps in ((256, 4), (1024, 8), (1024, 4))),
    CONFIG._replace(small=1024),
    CONFIG._replace(small=4096, block=16384, warps=16),
)
LATE = (CONFIG._replace(early=False),)


def select_variants(case: DecodeCase) -> dict[str, Select]:
    """By name; "one launch" is what there was before."""
    rule: host.Rule = ([case.keep], [0], 0.0, SINKS, RECENT)

    def lists(x: Buffers, scores: Lists) -> Lists:
        most = list_capacity(scores[0].shape[3], *rule[:3], SINKS + RECENT)
        new = functools.partial(torch.empty, dtype=torch.int32, device=x.k.device)
        return new(case.batch, case.kv_heads, most), new(case.batch, case.kv_heads)

    def one_launch(x: Buffers, scores: Lists) -> Lists:
        made = lists(x, scores)
        bins_host.launch_bins(*scores, x.counts, (None, 1, None, x.lengths, case.length), rule, *made)
        return made

    def two_launches(config: ListConfig) -> Select:
        def select(x: Buffers, scores: Lists) -> Lists:
            made = lists(x, scores)
            host.launch(*scores, x.counts, (None, 1, None, x.lengths, case.length), rule, *made, config)
            return made

        return select

    return {"one launch": one_launch} | {label(c): two_launches(c) for c in (*VARIANTS, *LATE)}


def label(config: ListConfig) -> str:
    """A variant in words."""
    words = f"tile {config.tile} x {config.share_warps} warps, list {config.small}/{config.block} x {config.warps} warps"
    return words + ("" if config.early else ", started late")


def differing(got: Lists, want: Lists) -> float:
    """Share of the wanted pages that are not in the other's list, or stand elsewhere in a list of another length."""
    missing = 0
    for a, b, m, n in zip(*(x.flatten(0, 1).tolist() for x in (got[0], want[0], got[1], want[1])), strict=True):
        missing += len(set(b[:n]) - set(a[:m])) if m == n and a[:m] == sorted(a[:m]) else n
    return missing / max(1, int(want[1].sum()))
