"""Results of a benchmark as a table, as JSON and as one HTML page with a plot."""

from __future__ import annotations

import dataclasses
import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from tsa_compile.tools.bench.attention import AttentionRow
    from tsa_compile.tools.bench.prefill import PrefillRow

Points = Sequence[tuple[float, float]]


def attention_table(rows: Sequence[AttentionRow], gpu: Mapping[str, float]) -> Table:
    """Times in ms, of short prompts from CUDA graphs; ratios over each dense form; achieved TFLOP/s of the kept part, and its
    share of the GPU's product. "+ strip" with launches."""
    from rich.table import Table

    table = Table(title=f"attention, bf16, causal; ceilings {_ceilings(gpu)}", title_justify="left")
    dense = list(dict.fromkeys(name for r in rows for name in r.dense))
    columns = ["case", "select", "sparse", "engine", "+ strip", *dense, *(f"vs {d}" for d in dense), "TFLOP/s", "extra MB"]
    for name in columns:
        table.add_column(name, justify="left" if name in ("case", "engine") else "right")
    for r in rows:
        best, attend = r.best, r.sparse_in_graph[r.best] - r.select_in_graph  # launches hide what kernels take
        tflops = r.case.flops * r.case.keep**2 / max(attend, 1e-6) / 1e9
        timed, whole = r.timed[0], r.timed[1][best]
        cells = [r.case.name, f"{r.select_in_graph:.3f}", f"{whole:.3f}", best, f"{r.completed[best]:.3f}"]
        cells += [f"{timed[d]:.3f}" if d in timed else "" for d in dense]
        cells += [f"{r.speedup(d):.2f}x" if d in r.dense else "" for d in dense]
        share = tflops / gpu["gemm_tflops"]
        table.add_row(*cells, f"{tflops:.0f} ({share:.0%})", f"{r.memory[best] / 1e6:.0f}")
    return table


def prefill_table(rows: Sequence[PrefillRow]) -> Table:
    """Time to the first token and peak memory, dense against transformed."""
    from rich.table import Table

    table = Table(title="prefill, time to first token", title_justify="left")
    for name in ("tokens", "dense ms", "sparse ms", "speed-up", "attention", "kept", "sites", "dense GB", "sparse GB"):
        table.add_column(name, justify="right")
    for r in rows:
        ratio = f"{r.dense / r.sparse:.2f}x"
        memory = [f"{m / 1e9:.1f}" for m in (r.dense_memory, r.sparse_memory)]
        sites, share = f"{r.replaced}/{r.sites}", f"{r.dense_attention / r.dense:.0%} -> {r.sparse_attention / r.sparse:.0%}"
        table.add_row(str(r.length), f"{r.dense:.1f}", f"{r.sparse:.1f}", ratio, share, f"{r.kept:.0%}", sites, *memory)
    return table


def _ceilings(gpu: Mapping[str, float]) -> str:
    return f"{gpu['gemm_tflops']:.0f} TFLOP/s, {gpu['copy_tbps']:.2f} TB/s"


def write_json(path: str, rows: Sequence[Any], **head: Any) -> None:
    """`head` and the rows as they are."""
    Path(path).write_text(json.dumps({**head, "rows": [dataclasses.asdict(r) for r in rows]}, indent=1) + "\n")


def attention_plot(rows: Sequence[AttentionRow]) -> dict[str, list[tuple[float, float]]]:
    """Speed-up over SDPA against length, a curve for each kept share, of the named lengths."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for r in rows:
        if r.case.name.startswith("L"):
            curves.setdefault(f"keep {r.case.keep}", []).append((r.case.length, r.speedup("SDPA")))
    return curves


def write_html(path: str, title: str, curves: Mapping[str, Points], notes: Sequence[str]) -> None:
    """One self-contained page: curves over length, both axes logarithmic."""
    body = [f"<h1>{html.escape(title)}</h1>", line_plot(curves), *(f"<p>{html.escape(n)}</p>" for n in notes)]
    style = "body{font:15px system-ui;margin:2em;max-width:60em}svg text{font:12px system-ui}"
    Path(path).write_text(f"<!doctype html><meta charset=utf-8><style>{style}</style>{''.join(body)}\n")


def line_plot(curves: Mapping[str, Points], width: int = 720, height: int = 420) -> str:
    """An SVG of curves `name -> [(x, y)]`, x and y above 0, on logarithmic axes of base 2."""
    points = [p for curve in curves.values() for p in curve]
    if not points:
        return "<p>nothing to plot</p>"
    (x0, x1), (y0, y1) = (_span([math.log2(p[i]) for p in points]) for i in (0, 1))
    left, top, w, h = 60, 20, width - 200, height - 70
    at = lambda x, y: (  # noqa: E731
        left + w * (math.log2(x) - x0) / (x1 - x0),
        top + h * (1 - (math.log2(y) - y0) / (y1 - y0)),
    )
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" role="img">']
    for e in range(math.ceil(y0), math.floor(y1) + 1):
        _, y = at(2**x0, 2**e)
        parts.append(f'<path d="M{left} {y:.1f}h{w}" stroke="#ddd"/><text x="8" y="{y + 4:.1f}">{2.0**e:g}x</text>')
    for e in range(math.ceil(x0), math.floor(x1) + 1):
        x, _ = at(2**e, 2**y0)
        label = f"{2**e // 1024}K" if e >= 10 else str(2**e)
        parts.append(f'<path d="M{x:.1f} {top}v{h}" stroke="#eee"/><text x="{x - 10:.1f}" y="{top + h + 18}">{label}</text>')
    for n, (name, curve) in enumerate(curves.items()):
        color = f"hsl({n * 360 // len(curves)} 65% 42%)"
        places = [at(*p) for p in sorted(curve)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in places]
        parts.append(f'<text x="{left + w + 12}" y="{top + 18 * (n + 1)}" fill="{color}">{html.escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin
