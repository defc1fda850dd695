"""From cells to rows: one for each length and variant."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from tsa_compile.tools.evaluate.cells import GENERATORS, NEEDLE, TEXT, TURNS
from tsa_compile.tools.evaluate.losses import perplexity
from tsa_compile.tools.evaluate.variants import DENSE

Data = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """One variant at one length; None where its cells were not measured.

    Args:
        sparsity: share of the tokens that are not kept, averaged over the layers that can be sparse.
        kl: mean KL(dense || variant) of the last 128 predictions, in nats; top1: share of equal top tokens.
        perplexity, perplexity_last: over all tokens, and over the last 128.
        scores: of the tasks; "needle" over all depths; "multi_turn" is its second question.
        answer_nll: loss of the right answers, in nats a token, mean over the tasks.
        first_turn: the first question of "multi_turn".
        seconds: prefill of one sample, in a batch; median over the tasks. speedup: dense seconds over these.
    """

    length: int
    variant: str
    family: str
    coverage: float | None
    sparsity: float | None = None
    kl: float | None = None
    top1: float | None = None
    perplexity: float | None = None
    perplexity_last: float | None = None
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    answer_nll: float | None = None
    first_turn: float | None = None
    seconds: float | None = None
    speedup: float | None = None


def lengths(data: Data) -> list[int]:
    return sorted({c["length"] for c in data["cells"]})


def cell(data: Data, length: int, task: str, variant: str) -> Mapping[str, Any] | None:
    """The cell, or None if it was not measured."""
    key = (length, task, variant)
    return next((c for c in data["cells"] if (c["length"], c["task"], c["variant"]) == key), None)


def rows(data: Data) -> list[Row]:
    """By length, then in the order of the variants; a variant that was not measured at a length has no row there.

    Means over tasks are over those that all variants of the length have.
    """
    out = []
    for length in lengths(data):
        by_variant: dict[str, dict[str, Any]] = {}
        for c in data["cells"]:
            if c["length"] == length:
                by_variant.setdefault(c["variant"], {})[c["task"]] = c
        found = [_row(data, length, v, by_variant) for v in data["variants"] if v["name"] in by_variant]
        dense = next((r.seconds for r in found if r.family == DENSE), None)
        for r in found:
            speedup = dense / r.seconds if dense and r.seconds else None
            out.append(dataclasses.replace(r, speedup=speedup))
    return out


def _row(data: Data, length: int, variant: Mapping[str, Any], by_variant: Mapping[str, dict[str, Any]]) -> Row:
    cells = by_variant[variant["name"]]

    def shared(field: str) -> list[float]:
        """The field in the tasks for which every variant has it."""
        return [c[field] for t, c in cells.items() if all(field in other.get(t, {}) for other in by_variant.values())]

    losses: dict[str, float] = {}
    if text := cells.get(TEXT):
        losses = {
            "kl": statistics.fmean(text["kl"]), "top1": statistics.fmean(text["top1"]),
            "perplexity": perplexity(text["nll_all"]), "perplexity_last": perplexity(text["nll_last"]),
        }  # fmt: skip
    answers, seconds = shared("answer_nll"), shared("seconds")
    return Row(
        length, variant["name"], variant["family"], variant["coverage"],
        sparsity=_sparsity(data, cells.values()),
        scores={t: cells[t]["score"] for t in (NEEDLE, *GENERATORS) if t in cells},
        answer_nll=statistics.fmean(answers) if answers else None,
        first_turn=cells.get(TURNS, {}).get("first_turn"),
        seconds=statistics.median(seconds) if seconds else None,
        **losses,
    )  # fmt: skip


def _sparsity(data: Data, cells: Iterable[Mapping[str, Any]]) -> float | None:
    """1 - kept, over the layers that can be sparse (a layer that this variant leaves dense keeps all), over the cells."""
    layers = data["model"]["layers"]
    shares = [1.0 - c["kept"].get(str(layer), 1.0) for c in cells if "kept" in c for layer in layers]
    return statistics.fmean(shares) if shares else None
