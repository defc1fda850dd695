"""RULER by variant: scores of all tasks, and the paired difference from dense with a bootstrap interval."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tsa_compile.tools.evaluate.ruler_data import PREFIX, TASKS
from tsa_compile.tools.evaluate.variants import DENSE

RESAMPLES = 4000


@dataclasses.dataclass(frozen=True)
class RulerRow:
    """One variant at one length, over the tasks that it and dense have; shares in [0, 1].

    Args:
        scores: of each task. mean: over the tasks. difference: mean minus dense's, with the ends `low` and `high` of its 95 %
            interval, from resampling the prompts of each task.
    """

    length: int
    variant: str
    scores: Mapping[str, float]
    mean: float
    difference: float
    low: float
    high: float


def ruler_rows(data: Mapping[str, Any], known: Sequence[str] = TASKS) -> list[RulerRow]:
    """By length, then in the order of the variants, over the tasks among `known`; none without a dense run."""
    found: dict[tuple[int, str], dict[str, list[float]]] = {}
    for c in data["cells"]:
        if c["task"] in known:
            found.setdefault((c["length"], c["variant"]), {})[c["task"]] = c["scores"]
    names = [v["name"] for v in data.get("variants", [])]
    out = []
    for length, variant in sorted(found, key=lambda key: (key[0], names.index(key[1]))):
        own, dense = found[length, variant], found.get((length, DENSE), {})
        tasks = [t for t in known if t in own and t in dense]
        if tasks:
            scores = {t: sum(own[t]) / len(own[t]) for t in tasks}
            pairs = [[a - b for a, b in zip(own[t], dense[t], strict=True)] for t in tasks]
            out.append(RulerRow(length, variant, scores, sum(scores.values()) / len(tasks), *paired(pairs)))
    return out


def paired(differences: Sequence[Sequence[float]], resamples: int = RESAMPLES) -> tuple[float, float, float]:
    """(mean over tasks of the mean difference, ends of its 95 % bootstrap interval); one sequence of prompts a task."""
    generator = torch.Generator().manual_seed(0)
    point, draws = 0.0, torch.zeros(resamples, dtype=torch.float64)
    for task in differences:
        values = torch.tensor(task, dtype=torch.float64)
        chosen = torch.randint(len(task), (resamples, len(task)), generator=generator)
        point += float(values.mean()) / len(differences)
        draws += values[chosen].mean(1) / len(differences)
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return point, low, high


def ruler_cells(data: Mapping[str, Any], length: int, known: Sequence[str] = TASKS, name: str = "RULER") -> list[list[str]]:
    """A table as text, its head first; empty without cells of these tasks at that length."""
    rows = [r for r in ruler_rows(data, known) if r.length == length]
    if not rows:
        return []
    tasks = [t for t in known if any(t in r.scores for r in rows)]
    head = [name, "mean", "minus dense, points", "95 %", *(t.removeprefix(PREFIX) for t in tasks)]
    return [head, *(_cells(r, tasks) for r in rows)]


def _cells(row: RulerRow, tasks: Sequence[str]) -> list[str]:
    interval = f"{100 * row.low:+.1f} to {100 * row.high:+.1f}"
    scores = [f"{100 * row.scores[t]:.0f}" if t in row.scores else "" for t in tasks]
    return [row.variant, f"{100 * row.mean:.1f}", f"{100 * row.difference:+.1f}", interval, *scores]
