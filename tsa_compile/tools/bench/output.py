"""Results of a benchmark as a table, as JSON and as one HTML page with a plot."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsa_compile.tools import plots

if TYPE_CHECKING:
    from rich.table import Table

    from tsa_compile.tools.bench.attention_bench import AttentionRow
    from tsa_compile.tools.bench.prefill import PrefillRow


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
        sites, share = f"{r.replaced}/{r.sites}", f"{r.dense_attention / r.dense:.0%}"
        if r.sparse_attention is not None:
            share += f" -> {r.sparse_attention / r.sparse:.0%}"
        table.add_row(str(r.length), f"{r.dense:.1f}", f"{r.sparse:.1f}", ratio, share, f"{r.kept:.0%}", sites, *memory)
    return table


def _ceilings(gpu: Mapping[str, float]) -> str:
    return f"{gpu['gemm_tflops']:.0f} TFLOP/s, {gpu['copy_tbps']:.2f} TB/s"


def write_json(path: str, rows: Sequence[Any], **head: Any) -> None:
    """`head` and the rows as they are."""
    Path(path).write_text(json.dumps({**head, "rows": [dataclasses.asdict(r) for r in rows]}, indent=1) + "\n")


def attention_plot(rows: Sequence[AttentionRow]) -> dict[str, list[plots.Point]]:
    """Speed-up over SDPA against length, a curve for each kept share, of the named lengths."""
    curves: dict[str, list[plots.Point]] = {}
    for r in rows:
        if r.case.name.startswith("L"):
            ratio = r.speedup("SDPA")
            curves.setdefault(f"keep {r.case.keep}", []).append((r.case.length, ratio, f"{r.case.name}: {ratio:.2f}x"))
    return curves


def write_html(path: str, title: str, curves: Mapping[str, Sequence[plots.Point]], notes: Sequence[str]) -> None:
    """One self-contained page: curves of speed-up over length, both axes logarithmic."""
    plot = plots.curves(curves, "tokens", "speed-up", "log2", "log2")
    body = [f"<h1>{html.escape(title)}</h1>", plots.legend(list(curves)), plot, *(f"<p>{html.escape(n)}</p>" for n in notes)]
    Path(path).write_text(f"<!doctype html><meta charset=utf-8><style>{plots.STYLE}</style>{''.join(body)}\n")
