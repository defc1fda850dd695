"""From the cells of a comparison of decode policies to rows: one for each length and policy."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tsa_compile.tools.evaluate.cells import TEXT
from tsa_compile.tools.evaluate.decode_tasks import OWN
from tsa_compile.tools.evaluate.ruler_data import TASKS as RULER
from tsa_compile.tools.evaluate.ruler_summary import RulerRow, ruler_rows
from tsa_compile.tools.evaluate.summary import Data, cell, lengths
from tsa_compile.tools.evaluate.variants import DENSE

STEPS = "steps, batch "  # and the number of requests: the names of the cells with times
TASK_SETS: Mapping[str, Sequence[str]] = {"RULER": RULER, "own tasks": OWN}


@dataclasses.dataclass(frozen=True)
class DecodeRow:
    """One policy at one length; None, or nothing, where its cells were not measured.

    Args:
        read: bytes of the cache that a token reads, by kind. share: of what dense reads.
        kl: KL(dense || policy) in nats of every position that was decoded, ascending.
        top1: share of equal top tokens. accepted: 5th percentile of sum min(p, q).
        tasks: by their set's name, scores and the paired difference from dense.
        ms, graph_ms: by batch, milliseconds a step by the clock, and of its CUDA graph alone. speedup: dense ms over these.
    """

    length: int
    variant: str
    family: str
    order: float | None
    read: Mapping[str, float] = dataclasses.field(default_factory=dict)
    share: float | None = None
    kl: Sequence[float] = ()
    top1: float | None = None
    accepted: float | None = None
    tasks: Mapping[str, RulerRow] = dataclasses.field(default_factory=dict)
    ms: Mapping[int, float] = dataclasses.field(default_factory=dict)
    graph_ms: Mapping[int, float] = dataclasses.field(default_factory=dict)
    speedup: Mapping[int, float] = dataclasses.field(default_factory=dict)

    @property
    def bytes_read(self) -> float | None:
        return sum(self.read.values()) if self.read else None


def quantile(values: Sequence[float], share: float) -> float:
    """Of ascending values: the one at `share`, in [0, 1]."""
    return values[round(share * (len(values) - 1))]


def decode_rows(data: Data) -> list[DecodeRow]:
    """By length, then in the order of the policies; one that was not measured at a length has no row there."""
    tasks = {name: {(r.length, r.variant): r for r in ruler_rows(data, known)} for name, known in TASK_SETS.items()}
    out = []
    for length in lengths(data):
        dense: DecodeRow | None = None
        for variant in data["variants"]:
            cells = [c for c in data["cells"] if (c["length"], c["variant"]) == (length, variant["name"])]
            if cells:
                row = _row(data, length, variant, cells)
                found = {name: rows[length, row.variant] for name, rows in tasks.items() if (length, row.variant) in rows}
                dense = row if row.family == DENSE else dense
                out.append(_beside(dataclasses.replace(row, tasks=found), dense))
    return out


def _row(data: Data, length: int, variant: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> DecodeRow:
    row = DecodeRow(length, variant["name"], variant["family"], variant["coverage"])
    text = cell(data, length, TEXT, row.variant)
    if text is not None:
        kl = sorted(x for one in text["kl"] for x in one)
        accepted = sorted(x for one in text["accepted"] for x in one)
        row = dataclasses.replace(row, read=text["read"], kl=kl, top1=text["top1"], accepted=quantile(accepted, 0.05))
    timed = {int(c["task"].removeprefix(STEPS)): c for c in cells if c["task"].startswith(STEPS)}
    graphs = {batch: c["graph_ms"] for batch, c in timed.items() if "graph_ms" in c}
    return dataclasses.replace(row, ms={batch: c["ms"] for batch, c in timed.items()}, graph_ms=graphs)


def _beside(row: DecodeRow, dense: DecodeRow | None) -> DecodeRow:
    if dense is None:
        return row
    share = row.bytes_read / dense.bytes_read if row.bytes_read and dense.bytes_read else None
    speedup = {batch: dense.ms[batch] / ms for batch, ms in row.ms.items() if batch in dense.ms}
    return dataclasses.replace(row, share=share, speedup=speedup)


def mean_kl(row: DecodeRow) -> float | None:
    return statistics.fmean(row.kl) if row.kl else None
