"""The evaluation as a Markdown table and as one self-contained HTML page."""

from __future__ import annotations

import html
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tsa_compile.tools import plots
from tsa_compile.tools.evaluate.cells import DEPTHS, GENERATORS, INSIDE, NEEDLE
from tsa_compile.tools.evaluate.document import document
from tsa_compile.tools.evaluate.ruler_summary import ruler_cells
from tsa_compile.tools.evaluate.setting import setting_line
from tsa_compile.tools.evaluate.summary import Data, Row, cell, lengths, rows
from tsa_compile.tools.evaluate.text_tables import html_table, markdown_table
from tsa_compile.tools.evaluate.variants import INNER

_STAGES = ("select", "sparse attention", "dense attention", "everything else")
_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("tokens dropped", lambda r: _percent(r.sparsity)),
    ("KL", lambda r: "" if r.kl is None else f"{r.kl:.2g}"),
    ("same top token", lambda r: _percent(r.top1)),
    ("perplexity, all", lambda r: _number(r.perplexity, 2)),
    ("perplexity, last 128", lambda r: _number(r.perplexity_last, 2)),
    *((t.replace("_", " "), lambda r, t=t: _percent(r.scores.get(t))) for t in (NEEDLE, *GENERATORS)),
    ("first turn", lambda r: _percent(r.first_turn)),
    ("answer loss", lambda r: _number(r.answer_nll, 3)),
    ("ms a prefill", lambda r: _number(None if r.seconds is None else 1000 * r.seconds, 1)),
    ("speed-up", lambda r: "" if r.speedup is None else f"{r.speedup:.2f}x"),
)


def title(data: Data) -> str:
    return f"{data['setting']['model']}: what sparse attention costs"


def markdown(data: Data) -> str:
    """A table for each length."""
    found = rows(data)
    parts = [f"# {title(data)}", setting_line(data)]
    for length in lengths(data):
        parts += [f"## {length:,} tokens", markdown_table(_cells([r for r in found if r.length == length]))]
        if ruler := ruler_cells(data, length):
            parts.append(markdown_table(ruler))
    return "\n\n".join(parts) + "\n"


def page(data: Data) -> str:
    """The whole report; loads nothing."""
    body = [f"<h1>{html.escape(title(data))}</h1><p class=soft>{html.escape(setting_line(data))}</p>", _about(data)]
    found = rows(data)
    for length in lengths(data):
        own = [r for r in found if r.length == length]
        body += [
            f"<h2>{length:,} tokens</h2>",
            html_table(_cells(own)),
            html_table(ruler) if (ruler := ruler_cells(data, length)) else "",
            _frontier(own),
            _needles(data, own),
            _layers(data, own),
            _inside(data, own),
        ]
    return document(title(data), "".join(body))


def _about(data: Data) -> str:
    model = data["model"]
    sentences = (
        f"{len(model['layers'])} of {model['depth']} layers can be sparse ({_spans(model['layers'])}). "
        f"The paper's half, by drift: {_spans(model['low_drift'])}. "
        "Tokens dropped: the share that a layer does not keep, averaged over "
        "all layers that can be sparse. KL: divergence of the last 128 predictions from dense, in nats. Scores: share of the "
        "right answers named. Multi turn: a second question about another part of the same cached prompt."
    )
    return f"<p>{html.escape(sentences)}</p>"


def _cells(found: Sequence[Row]) -> list[list[str]]:
    """The table's lines, the head first, without columns that are empty."""
    columns = [(name, [f(r) for r in found]) for name, f in (("variant", lambda r: r.variant), *_COLUMNS)]
    columns = [(name, values) for name, values in columns if any(values)]
    return [[name for name, _ in columns], *map(list, zip(*[values for _, values in columns], strict=True))]


def _frontier(found: Sequence[Row]) -> str:
    families = list(dict.fromkeys(r.family for r in found))
    drawn = []
    for label, axis, value in (
        ("KL from dense, nats", "log10", lambda r: r.kl),
        ("perplexity, all tokens", "linear", lambda r: r.perplexity),
        ("needle found", "linear", lambda r: r.scores.get(NEEDLE)),
        ("loss of the right answers, nats a token", "linear", lambda r: r.answer_nll),
        ("ms a prefill", "linear", lambda r: None if r.seconds is None else 1000 * r.seconds),
    ):
        series = {f: _points(found, f, value) for f in families}
        drawn.append(plots.curves(series, "tokens dropped", label, y=axis))
    return f"<h3>Loss against sparsity</h3>{plots.legend(families)}<div class=plots>{''.join(drawn)}</div>"


def _points(found: Sequence[Row], family: str, value: Callable[[Row], float | None]) -> list[plots.Point]:
    out = []
    for r in found:
        y = value(r)
        if r.family == family and y is not None and r.sparsity is not None:
            out.append((r.sparsity, y, f"{r.variant}: {y:.4g}"))
    return out


def _needles(data: Data, found: Sequence[Row]) -> str:
    cells = [cell(data, r.length, NEEDLE, r.variant) for r in found]
    values: list[list[float | None]] = [c["groups"] if c else [None] * len(DEPTHS) for c in cells]
    depths = [f"{d:.0%}" for d in DEPTHS]
    plot = plots.heat_map([r.variant for r in found], depths, values, "found, % of the samples")
    return f"<h3>Needle by depth</h3><div class=wide>{plot}</div>"


def _layers(data: Data, found: Sequence[Row]) -> str:
    layers, sparse = data["model"]["layers"], [r for r in found if r.sparsity]
    values = [[_kept(data, r, layer) for layer in layers] for r in sparse]
    kept = plots.heat_map([r.variant for r in sparse], list(map(str, layers)), values, "tokens kept, % by layer; empty: dense")
    overlap = _overlap(data, sparse)
    return f"<h3>Kept tokens by layer and head</h3><div class=wide>{kept}</div>{overlap}"


def _kept(data: Data, row: Row, layer: int) -> float | None:
    shares = [
        c["kept"].get(str(layer))
        for c in data["cells"]
        if (c["length"], c["variant"]) == (row.length, row.variant) and "kept" in c
    ]
    known = [s for s in shares if s is not None]
    return statistics.fmean(known) if known else None


def _overlap(data: Data, sparse: Sequence[Row]) -> str:
    """Of one variant: the middle one of the completed family."""
    chosen = [r for r in sparse if r.family == INNER]
    found = cell(data, chosen[len(chosen) // 2].length, INSIDE, chosen[len(chosen) // 2].variant) if chosen else None
    if not found or not found.get("overlap"):
        return ""
    table: Mapping[str, list[float]] = found["overlap"]
    heads = [str(i) for i in range(max(map(len, table.values())))]
    label = "kept by another head of the layer too, %"
    plot = plots.heat_map([f"layer {n}" for n in table], heads, list(table.values()), label)
    text = "All heads of a layer keep equally many tokens, but not the same ones. Of one head's kept tokens, the share that"
    return f"<p>{text} another head keeps too, on average ({html.escape(found['variant'])}):</p><div class=wide>{plot}</div>"


def _inside(data: Data, found: Sequence[Row]) -> str:
    cells = [(r, cell(data, r.length, INSIDE, r.variant)) for r in found]
    known = [(r.variant, c["time"]) for r, c in cells if c]
    splits = [{k: 1000 * v for k, v in time.items()} for _, time in known]
    plot = plots.bars([name for name, _ in known], splits, _STAGES, "ms")
    note = "device time of one sample's prefill" if data["setting"]["device"] != "CPU" else "CPU time of one sample's prefill"
    return f"<h3>Where the time goes</h3><p class=soft>{note}</p>{plots.legend(_STAGES)}<div class=wide>{plot}</div>"


def _spans(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    out: list[list[int]] = []
    for n in numbers:
        if out and n == out[-1][-1] + 1:
            out[-1].append(n)
        else:
            out.append([n])
    return ", ".join(str(s[0]) if len(s) == 1 else f"{s[0]}-{s[-1]}" for s in out)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _number(value: Any, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
