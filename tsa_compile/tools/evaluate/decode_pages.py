"""The comparison of decode policies as Markdown tables and as one self-contained HTML page."""

from __future__ import annotations

import functools
import html
from collections.abc import Callable, Sequence

from tsa_compile.tools import plots
from tsa_compile.tools.evaluate.decode_summary import TASK_SETS, DecodeRow, decode_rows, mean_kl, quantile
from tsa_compile.tools.evaluate.document import document
from tsa_compile.tools.evaluate.ruler_summary import ruler_cells
from tsa_compile.tools.evaluate.setting import setting_line
from tsa_compile.tools.evaluate.summary import Data, lengths
from tsa_compile.tools.evaluate.text_tables import html_table, markdown_table

Value = Callable[[DecodeRow], float | None]
NOISE = 1e-6  # nats: what is below is rounding
KINDS = ("keys", "values", "index")
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 1.0)


def title(data: Data) -> str:
    return f"{data['setting']['model']}: decode policies beside one another"


def markdown(data: Data) -> str:
    """Tables for each length."""
    found = decode_rows(data)
    parts = [f"# {title(data)}", setting_line(data), _about(data)]
    for length in lengths(data):
        own = [r for r in found if r.length == length]
        parts += [f"## {length:,} tokens", markdown_table(_table(own)), *map(markdown_table, _tasks(data, length))]
    return "\n\n".join(parts) + "\n"


def page(data: Data) -> str:
    """The whole report; loads nothing."""
    found = decode_rows(data)
    body = [f"<h1>{html.escape(title(data))}</h1><p class=soft>{html.escape(setting_line(data))}</p>"]
    body.append(f"<p>{html.escape(_about(data))}</p>")
    for length in lengths(data):
        own = [r for r in found if r.length == length]
        body += [f"<h2>{length:,} tokens</h2>", html_table(_table(own)), _plots(own), _read(own)]
        body += [f"<h3>Answers</h3>{html_table(table)}" for table in _tasks(data, length)]
    return document(title(data), "".join(body))


def _about(data: Data) -> str:
    m, last = data["model"], data["setting"]["last"]
    on_cpu = data["setting"]["device"] == "CPU"
    times = "Times are of reference code on a CPU: they say nothing about a GPU." if on_cpu else "Steps are replayed CUDA graphs."
    return (
        f"{m['layers']} layers, {m['heads']} query and {m['kv_heads']} KV heads. Every prompt is read by the model as it is; the "
        "policies decode. Read: bytes of the cache that a step reads for a token, keys, values and index, counted from what its "
        "operators were given, without weights and scratch. KL(dense || policy), in nats: the last "
        f"{last} tokens of each text of real prose are decoded one by one over the policy's own cache, beside the model as it is "
        "that reads the whole text; worst: of all positions. Accepted: the 5th percentile of sum min(p, q). Dense is Exact(): "
        "every key, by a kernel for decode. Points: the mean score of the tasks minus dense's, on the same prompts. " + times
    )


def _table(found: Sequence[DecodeRow]) -> list[list[str]]:
    """The table's lines, the head first, without columns that are empty."""
    columns: list[tuple[str, Callable[[DecodeRow], str]]] = [
        ("policy", lambda r: r.variant),
        ("read, MB a token", lambda r: _number(r.bytes_read and r.bytes_read / 1e6)),
        ("of dense", lambda r: _percent(r.share)),
        ("KL, mean", lambda r: _small(mean_kl(r))),
        ("95 %", lambda r: _small(quantile(r.kl, 0.95) if r.kl else None)),
        ("worst", lambda r: _small(r.kl[-1] if r.kl else None)),
        ("same top token", lambda r: _percent(r.top1)),
        ("accepted", lambda r: "" if r.accepted is None else f"{r.accepted:.3f}"),
        *((f"{name}, points to dense", functools.partial(_difference, name)) for name in TASK_SETS),
    ]
    for batch in sorted({b for r in found for b in r.ms}):
        columns.append((f"ms a step, batch {batch}", functools.partial(_ms, batch)))
        columns.append(("its graph", functools.partial(_graph_ms, batch)))
        columns.append(("faster than dense", functools.partial(_speedup, batch)))
    texts = [(name, [f(r) for r in found]) for name, f in columns]
    texts = [(name, values) for name, values in texts if any(values)]
    return [[name for name, _ in texts], *map(list, zip(*[values for _, values in texts], strict=True))]


def _tasks(data: Data, length: int) -> list[list[list[str]]]:
    return [table for name, known in TASK_SETS.items() if (table := ruler_cells(data, length, known, name))]


def _plots(found: Sequence[DecodeRow]) -> str:
    """What is lost, and how long a step takes, against what is read."""
    families = list(dict.fromkeys(r.family for r in found))
    wanted: list[tuple[str, str, Value]] = [
        ("KL, mean, nats", "log10", lambda r: _above_noise(mean_kl(r))),
        ("KL, worst position, nats", "log10", lambda r: _above_noise(r.kl[-1] if r.kl else None)),
        ("5th percentile of acceptance", "linear", lambda r: r.accepted),
    ]
    wanted += [(f"{name}, mean score", "linear", functools.partial(_score, name)) for name in TASK_SETS]
    batches = sorted({b for r in found for b in r.ms})
    wanted += [(f"ms a step, batch {b}", "linear", functools.partial(_milliseconds, b)) for b in batches]
    drawn = [
        plots.curves({f: _points(found, f, value) for f in families}, "bytes read, of dense", label, y=axis)
        for label, axis, value in wanted
        if any(value(r) is not None for r in found)
    ]
    drawn.append(plots.curves({f: _spread(found, f) for f in families}, "share of the positions", "KL below, nats", y="log10"))
    text = "The last plot: of each kind's middle policy, the KL that a share of the positions stays below."
    head = f"<h3>Loss against bytes</h3>{plots.legend(families)}<p class=soft>{text}</p>"
    return f"{head}<div class=plots>{''.join(drawn)}</div>"


def _above_noise(value: float | None) -> float | None:
    return None if value is None or value < NOISE else value


def _points(found: Sequence[DecodeRow], family: str, value: Value) -> list[plots.Point]:
    own = [(r, value(r)) for r in found if r.family == family and r.share is not None]
    return [(r.share, y, f"{r.variant}: {y:.4g}") for r, y in own if y is not None and r.share is not None]


def _spread(found: Sequence[DecodeRow], family: str) -> list[plots.Point]:
    own = [r for r in found if r.family == family and r.kl]
    if not own:
        return []
    r = own[len(own) // 2]
    return [(x, y, f"{r.variant}: {x:.0%} below {y:.3g}") for x in QUANTILES if (y := quantile(r.kl, x)) >= NOISE]


def _read(found: Sequence[DecodeRow]) -> str:
    known = [r for r in found if r.read]
    parts = [{kind: count / 1e6 for kind, count in r.read.items()} for r in known]
    plot = plots.bars([r.variant for r in known], parts, KINDS, "MB", "bytes of the cache read for a token")
    return f"<h3>Bytes of the cache read for a token</h3>{plots.legend(KINDS)}<div class=wide>{plot}</div>"


def _difference(name: str, row: DecodeRow) -> str:
    found = row.tasks.get(name)
    return "" if found is None else f"{100 * found.difference:+.1f}"


def _score(name: str, row: DecodeRow) -> float | None:
    return row.tasks[name].mean if name in row.tasks else None


def _milliseconds(batch: int, row: DecodeRow) -> float | None:
    """The graph's, where there is one."""
    return row.graph_ms.get(batch, row.ms.get(batch))


def _ms(batch: int, row: DecodeRow) -> str:
    return _number(row.ms.get(batch))


def _graph_ms(batch: int, row: DecodeRow) -> str:
    return _number(row.graph_ms.get(batch))


def _speedup(batch: int, row: DecodeRow) -> str:
    return f"{row.speedup[batch]:.2f}x" if batch in row.speedup else ""


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _small(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}" if value >= NOISE else f"< {NOISE:g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
