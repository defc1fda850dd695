"""Decode steps by other page indexes than means, which `tsa-compile bench decode` times: bases of pages, and completion."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tsa_compile.kernels.common.pages import PAGE
from tsa_compile.tools.bench.decode_cases import Buffers, DecodeCase
from tsa_compile.tools.bench.decode_forms import Form, Lists, attend, score, select

Tensor = torch.Tensor
REFINED = 0.2  # share of the pages that the basis ranks, as `PageSparse.refine`
tsa = torch.ops.tsa


def index_forms(case: DecodeCase, buffers: Sequence[Buffers]) -> dict[str, Form]:
    """A step by bases, and one with completion; what they do more than a step by means, on results made here; an append."""
    bases = {id(x): tsa.page_basis(x.k, None, 1, None, None, None) for x in buffers}
    values = {id(x): tsa.page_sums(x.v, None, 1, None, None, None)[0] for x in buffers}
    scores = {id(x): score(case, x) for x in buffers}
    firsts = {id(x): first(case, x, scores[id(x)]) for x in buffers}
    lists = {id(x): select(case, x, scores[id(x)]) for x in buffers}
    attended = {id(x): attend(case, x, lists[id(x)]) for x in buffers}

    def refine(x: Buffers, scored: Lists, best: Lists) -> Lists:
        view = (None, 1, None, x.lengths, case.length, case.scale)
        refined: Lists = tsa.refine_scores(x.q, scored[0], x.counts, *bases[id(x)], *best, *view)
        return refined

    def complete(x: Buffers, out: Lists, scored: Lists, pages: Lists) -> Lists:
        index = (scored[0], values[id(x)], x.counts)
        completed: Lists = tsa.complete_pages(*out, *index, *pages, None, 1, None, x.lengths, case.length)
        return completed

    def by_basis(x: Buffers) -> Lists:
        scored = score(case, x)
        return attend(case, x, select(case, x, refine(x, scored, first(case, x, scored))))

    def completed(x: Buffers) -> Lists:
        scored = score(case, x)
        pages = select(case, x, scored)
        return complete(x, attend(case, x, pages), scored, pages)

    def append(x: Buffers) -> None:
        tsa.append_basis(*bases[id(x)], x.k, None, 1, None, x.before, x.lengths, None, 1)

    return {
        "pages, basis": by_basis,
        "pages, completed": completed,
        "select first": lambda x: first(case, x, scores[id(x)]),
        "refine": lambda x: refine(x, scores[id(x)], firsts[id(x)]),
        "complete": lambda x: complete(x, attended[id(x)], scores[id(x)], lists[id(x)]),
        "append basis": append,
    }


def first(case: DecodeCase, x: Buffers, scored: Lists) -> Lists:
    """The pages that the basis ranks."""
    rule = (case.kv_heads, [REFINED], [0], 0.0, 0, 1)
    lists: Lists = tsa.select_pages(*scored, x.counts, None, 1, None, x.lengths, case.length, *rule)
    return lists


def index_floors(case: DecodeCase) -> dict[str, int]:
    """Bytes that these forms must read."""
    pages = case.batch * case.kv_heads * case.length // PAGE
    refine = int(REFINED * pages * (4 * case.dim + 8 * PAGE + 16))
    means = case.index_bytes + case.kept_bytes
    return {
        "pages, basis": means + refine, "pages, completed": means + case.index_bytes, "refine": refine,
        "complete": case.index_bytes,
    }  # fmt: skip
