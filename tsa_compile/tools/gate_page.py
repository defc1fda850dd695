"""What `choose_schedule` measured, as one HTML page: the acceptance statistic by position, for each schedule that was tried."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tsa_compile.learn.acceptance import BIN, worst
from tsa_compile.tools import plots

MAX_CURVES = 5  # beside the threshold


def write_page(path: str | Path, notes: Mapping[str, Any], title: str) -> None:
    """A self-contained page of a plan's notes: the plot of the schedules nearest to the threshold, and a table of all."""
    tried: Mapping[str, Any] = notes["tried"]
    shown = sorted(tried, key=lambda name: abs(_worst(tried[name]) - notes["threshold"]))[:MAX_CURVES]
    curves = {name: _curve(tried[name]) for name in tried if name in shown}
    ends = sorted({point[0] for curve in curves.values() for point in curve})
    curves[f"threshold {notes['threshold']}"] = [(x, notes["threshold"], "threshold") for x in (ends[0], ends[-1])]
    rows = "".join(
        f"<tr><td>{html.escape(name)}{' (chosen)' if name == notes['chosen'] else ''}<td>{found['pages read']:.1%}"
        f"<td>{_worst(found):.4f}"
        for name, found in tried.items()
    )
    body = (
        f"<h1>{html.escape(title)}</h1><p>5th percentile of sum min(p, q) in bins of {BIN:,} positions; the worst bin counts.</p>"
        f"{plots.legend(list(curves))}{plots.curves(curves, 'position', '5th percentile of acceptance', 'linear', 'linear')}"
        f"<table><tr><th>schedule<th>pages read<th>worst bin{rows}</table>"
    )
    Path(path).write_text(f"<!doctype html><meta charset=utf-8><style>{plots.STYLE}</style>{body}\n")


def _worst(found: Mapping[str, Any]) -> float:
    return worst(found["5th percentile by bin"])


def _curve(found: Mapping[str, Any]) -> list[plots.Point]:
    by_bin = {int(n): value for n, value in found["5th percentile by bin"].items()}
    return [
        (BIN * (n + 0.5), value, f"positions {BIN * n:,} to {BIN * (n + 1):,}: {value:.4f}")
        for n, value in sorted(by_bin.items())
    ]
