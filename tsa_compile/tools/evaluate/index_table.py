"""Rows of the emulation of page indexes as Markdown tables, one for each share of the pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tsa_compile.tools.evaluate.text_tables import markdown_table

Row = dict[str, Any]
_HEAD = (
    "index", "texts", "pages read", "bytes read a key", "KL", "worst position", "top-1", "error", "worst layer", "worst head",
    "exact top pages found",
)  # fmt: skip


def tables(rows: Sequence[Row], names: Sequence[str], reuse: str) -> str:
    """One table a share, kinds in the order of `names`; then the overlap of layers by their distance."""
    shares = sorted({row["share"] for row in rows})
    parts = []
    for share in shares:
        of_kind = [[r for r in rows if (r["phase"], r["name"], r["share"]) == ("decode", name, share)] for name in names]
        lines = [_line(name, found) for name, found in zip(names, of_kind, strict=True) if found]
        if lines:
            parts.append(f"{100 * share:g} % of the pages:\n\n{markdown_table([_HEAD, *lines])}")
    overlaps = [row for row in rows if row["phase"] == "reuse" and row["name"] == reuse]
    if overlaps:
        parts.append(f"Layers apart, against exact top pages:\n\n{markdown_table(_overlaps(overlaps))}")
    return "\n\n".join(parts)


def _line(name: str, rows: Sequence[Row]) -> list[str]:
    """The mean over the texts; the worst of any."""
    mean = {f: sum(r[f] for r in rows) / len(rows) for f in ("kept_with_dense", "kl", "top1", "error", "found")}
    worst = {f: max(r[f] for r in rows) for f in ("worst", "worst_layer", "worst_head")}
    return [
        name, str(len(rows)), f"{100 * mean['kept_with_dense']:.1f} %", f"{rows[0]['bytes_per_key']:.3g}", f"{mean['kl']:.4f}",
        f"{worst['worst']:.2f}", f"{100 * mean['top1']:.0f} %", f"{mean['error']:.3f}", f"{worst['worst_layer']:.2f}",
        f"{worst['worst_head']:.2f}", f"{100 * mean['found']:.0f} %",
    ]  # fmt: skip


def _overlaps(rows: Sequence[Row]) -> list[list[str]]:
    lines = [["pages kept", "layers apart", "texts", "exact top pages found", "mass over own pages'", "worst layer and head"]]
    for share in sorted({row["share"] for row in rows}):
        of_share = [{int(d): x for d, x in row["distances"].items()} for row in rows if row["share"] == share]
        for distance in of_share[0]:
            found = [x[distance] for x in of_share]
            mean = {f: sum(x[f] for x in found) / len(found) for f in ("found", "mass")}
            worst = min(x["worst"] for x in found)
            numbers = [f"{100 * mean['found']:.0f} %", f"{mean['mass']:.3f}", f"{worst:.2f}"]
            lines.append([f"{100 * share:g} %", str(distance), str(len(found)), *numbers])
    return lines
