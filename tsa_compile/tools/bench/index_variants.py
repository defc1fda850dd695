"""Variants of the launches on page indexes, for `tsa-compile bench decode --sweep score,refine,complete`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tsa_compile.kernels.attend.completion import host as completion
from tsa_compile.kernels.attend.sampled.config import SampledConfig
from tsa_compile.kernels.common.launch import IndexConfig
from tsa_compile.kernels.score.page_basis import host as page_basis
from tsa_compile.kernels.score.page_index import host as page_index
from tsa_compile.tools.bench.decode_cases import Buffers, DecodeCase
from tsa_compile.tools.bench.decode_forms import Form, attend, score, select
from tsa_compile.tools.bench.index_forms import first

SCORE = tuple(
    IndexConfig(*numbers)  # num_warps, num_stages, resident
    for numbers in ((4, 3, 4), (4, 2, 5), (4, 2, 8), (4, 4, 3), (4, 4, 4), (4, 5, 3), (2, 3, 5), (8, 4, 3))
)
REFINE = tuple(
    page_basis.BasisConfig(*numbers)  # tile, num_warps, num_stages, resident
    for numbers in (
        (32, 8, 2, 2), (32, 8, 3, 2), (32, 8, 1, 2), (32, 8, 2, 4), (32, 4, 2, 2), (32, 4, 3, 2), (64, 8, 2, 1), (16, 4, 2, 4),
    )
)  # fmt: skip
COMPLETE = tuple(
    IndexConfig(*numbers)  # num_warps, num_stages, resident
    for numbers in ((4, 5, 4), (4, 3, 4), (4, 3, 5), (4, 5, 3), (4, 7, 3), (8, 5, 2), (2, 5, 4))
)


def index_variants(case: DecodeCase, buffers: Sequence[Buffers], which: str) -> dict[str, Form]:
    """By name, of "score", "refine" or "complete"; each on results made here, the default first."""
    if which == "score":
        return {label(c): lambda x, c=c: _score(case, x, c) for c in SCORE}  # type: ignore[misc]
    scores = {id(x): score(case, x) for x in buffers}
    if which == "refine":
        bases = {id(x): torch.ops.tsa.page_basis(x.k, None, 1, None, None, None) for x in buffers}
        firsts = {id(x): first(case, x, scores[id(x)]) for x in buffers}

        def refine(x: Buffers, config: page_basis.BasisConfig) -> object:
            index: Any = (scores[id(x)][0], x.counts, *bases[id(x)], *firsts[id(x)])
            given: Any = (x.q, *index, None, 1, None, x.lengths, case.length, case.scale)
            return page_basis.refine_scores(*given, config=config)

        return {label(c): lambda x, c=c: refine(x, c) for c in REFINE}  # type: ignore[misc]
    values = {id(x): torch.ops.tsa.page_sums(x.v, None, 1, None, None, None)[0] for x in buffers}
    lists = {id(x): select(case, x, scores[id(x)]) for x in buffers}
    attended = {id(x): attend(case, x, lists[id(x)]) for x in buffers}

    def complete(x: Buffers, config: IndexConfig) -> object:
        index = (scores[id(x)][0], values[id(x)], x.counts, *lists[id(x)])
        return completion.complete_pages(*attended[id(x)], *index, None, 1, None, x.lengths, case.length, config=config)

    return {label(c): lambda x, c=c: complete(x, c) for c in COMPLETE}  # type: ignore[misc]


def _score(case: DecodeCase, x: Buffers, config: IndexConfig) -> object:
    return page_index.page_scores(x.q, x.sums, x.counts, None, 1, None, x.lengths, case.length, case.scale, config=config)


def label(config: IndexConfig | page_basis.BasisConfig | SampledConfig) -> str:
    """A variant in words."""
    return ", ".join(f"{name.removeprefix('num_').replace('_', ' ')} {value}" for name, value in config._asdict().items())
