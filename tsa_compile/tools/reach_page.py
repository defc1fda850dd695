"""What `tsa.reach` found, as one HTML page: how far each phase of a block can look back, by depth."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from tsa_compile.passes.check_reach import Reach
from tsa_compile.reach import PlanReach
from tsa_compile.tools import plots

MAX_CURVES = 5
Step = tuple[int, int]


def reach_curves(reach: Reach) -> dict[str, list[plots.Point]]:
    """A curve for some depths: (phase, the first distance that it does not reach) where the slope changes."""
    curves: dict[str, list[plots.Point]] = {}
    for depth in _depths(len(reach.by_depth) - 1):
        steps = [(phase, reach.first_unreached(phase, depth)) for phase in range(reach.period)]
        steps.append((reach.period, steps[0][1]))  # the next block's first
        curves[f"{depth} attention{'s' * (depth > 1)}"] = [
            (phase, distance, f"phase {phase % reach.period}: {distance - 1} tokens back") for phase, distance in _corners(steps)
        ]
    return curves


def _depths(layers: int) -> list[int]:
    """The first, powers of two, the last; at most MAX_CURVES."""
    powers = [1 << n for n in range(layers.bit_length()) if 1 << n < layers]
    return [*powers[: MAX_CURVES - 1], layers]


def _corners(steps: Sequence[Step]) -> list[Step]:
    """The ends of the straight parts of a sequence of points, one phase apart."""
    inner = (
        now for before, now, after in zip(steps, steps[1:], steps[2:], strict=False) if now[1] - before[1] != after[1] - now[1]
    )
    return [steps[0], *inner, steps[-1]]


def write_page(path: str | Path, found: PlanReach, title: str) -> None:
    """A self-contained page: what was found in words, the plot, and what each attention reads for certain."""
    curves = reach_curves(found.reach)
    label = f"position in a block of {found.reach.period}"
    rows = "".join(
        f"<tr><td>{html.escape(layer.module)}<td>{html.escape(layer.policy)}<td>{_longest(layer.edges.spans, found.reach.length)}"
        for layer in found.layers
    )
    body = (
        f"<h1>{html.escape(title)}</h1><p>{html.escape(str(found))}</p>{plots.legend(list(curves))}"
        f"{plots.curves(curves, label, 'first distance not reached', 'linear', 'linear')}"
        f"<table><tr><th>module<th>policy<th>farthest key that is read for certain{rows}</table>"
    )
    Path(path).write_text(f"<!doctype html><meta charset=utf-8><style>{plots.STYLE}</style>{body}\n")


def _longest(spans: Sequence[Sequence[Step]], length: int) -> str:
    """The farthest distance of the phase that looks back least, and of the one that looks back most."""
    farthest = [min(max((last for _, last in runs), default=0), length - 1) for runs in spans]
    low, high = min(farthest), max(farthest)
    return f"{low}" if low == high else f"{low} to {high}"
