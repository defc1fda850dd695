"""Plots as inline SVG that follow the page's colours, light or dark."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence

Point = tuple[float, float, str]  # x, y, what it is (shown on hover)
Axis = tuple[Callable[[float], float], list[float]]  # value -> place in [0, 1]; ticks
_W, _H, _LEFT, _RIGHT, _BOTTOM, _TOP = 480, 310, 66, 24, 44, 14


# For a page's <style>: colours c0 to c9, light and dark, and the classes below.
STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--soft:#667079;--grid:#dfe3e8;--heat:#2a78d6;
--c0:#1b1f24;--c1:#d1493f;--c2:#1f77c9;--c3:#1a8f5a;--c4:#9a6a00;--c5:#8a4fc4;--c6:#0b8a94;--c7:#c2408f;--c8:#7a7f85;--c9:#8d9b1a}
@media(prefers-color-scheme:dark){:root{--bg:#15181c;--fg:#e6e9ec;--soft:#9aa4ae;--grid:#343a41;--heat:#4b97ee;
--c0:#e6e9ec;--c1:#f0796f;--c2:#62adf5;--c3:#4fc28c;--c4:#d9a53a;--c5:#bb8cf0;--c6:#4cc3cd;--c7:#ee86c1;--c8:#a3a9af;--c9:#c5d24f}}
body{font:15px/1.5 system-ui,sans-serif;background:var(--bg);color:var(--fg);margin:2em auto;max-width:84em;padding:0 1em}
.wide{overflow-x:auto}svg text{font:12px system-ui,sans-serif;fill:var(--fg)}
.grid{stroke:var(--grid)}.line{fill:none;stroke-width:2}.heat{fill:var(--heat)}
.legend{display:flex;flex-wrap:wrap;gap:.3em 1.4em;list-style:none;padding:0}
.key{display:inline-block;width:.8em;height:.8em;margin-right:.4em;border-radius:2px}
""" + "".join(
    f".c{n}.line{{stroke:var(--c{n})}}.c{n}.dot,.fill.k{n}{{fill:var(--c{n})}}.key.k{n}{{background:var(--c{n})}}"
    for n in range(10)
)


def curves(series: Mapping[str, Sequence[Point]], x_label: str, y_label: str, x: str = "share", y: str = "linear") -> str:
    """Lines with dots, at most ten.

    Args:
        x, y: the axes: "share" (0 to 1, in percent), "linear" (from 0), "log2" or "log10" (what is not above 0 is left out).
    """
    series = {n: [p for p in ps if _fits(x, p[0]) and _fits(y, p[1])] for n, ps in series.items()}
    points = [p for ps in series.values() for p in ps]
    if not points:
        return "<p>nothing measured</p>"
    (x_scale, x_ticks), (y_scale, y_ticks) = _axis(x, [p[0] for p in points]), _axis(y, [p[1] for p in points])
    width, height = _W - _LEFT - _RIGHT, _H - _TOP - _BOTTOM
    at_x: Callable[[float], float] = lambda value: _LEFT + width * x_scale(value)  # noqa: E731
    at_y: Callable[[float], float] = lambda value: _TOP + height * (1 - y_scale(value))  # noqa: E731
    parts = [_open(_W, _H, f"{y_label} against {x_label}")]
    for tick in y_ticks:
        parts.append(f'<path class=grid d="M{_LEFT} {at_y(tick):.1f}h{width}"/>')
        parts.append(_text(_LEFT - 6, at_y(tick) + 4, _tick(y, tick), "end"))
    parts += [_text(at_x(tick), _H - _BOTTOM + 16, _tick(x, tick)) for tick in x_ticks]
    parts.append(_text(_LEFT + width / 2, _H - 8, x_label))
    parts.append(
        f'<text transform="translate(14 {_TOP + height / 2:.0f}) rotate(-90)" text-anchor=middle>{html.escape(y_label)}</text>'
    )
    for n, curve in enumerate(series.values()):
        places = [(at_x(p[0]), at_y(p[1]), p[2]) for p in sorted(curve)]
        line = " ".join(f"{left:.1f},{top:.1f}" for left, top, _ in places)
        parts.append(f'<polyline class="line c{n}" points="{line}"/>')
        for left, top, name in places:
            dot = f'class="dot c{n}" cx="{left:.1f}" cy="{top:.1f}" r="4"'
            parts.append(f"<circle {dot}><title>{html.escape(name)}</title></circle>")
    return "".join([*parts, "</svg>"])


def legend(names: Sequence[str]) -> str:
    """The colours of `curves` and `bars`, in order."""
    items = "".join(f'<li><i class="key k{n}"></i>{html.escape(name)}</li>' for n, name in enumerate(names))
    return f"<ul class=legend>{items}</ul>"


def heat_map(row_names: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], label: str) -> str:
    """Values in [0, 1], written into their fields in percent; None is left empty."""
    longest = max([len(n) for n in row_names], default=0)
    left, top, cell_w, cell_h = 16 + 6.6 * longest, 22, 40 if len(columns) <= 12 else 28, 22
    parts = [
        f"<p class=soft>{html.escape(label)}</p>",
        _open(left + cell_w * len(columns) + 8, top + cell_h * len(row_names) + 6, label),
    ]
    parts += [_text(left + cell_w * (i + 0.5), top - 8, c) for i, c in enumerate(columns)]
    for r, (name, row) in enumerate(zip(row_names, values, strict=True)):
        y = top + cell_h * r
        parts.append(_text(left - 8, y + 15, name, "end"))
        for i, value in enumerate(row):
            x = left + cell_w * i
            shade = 0.0 if value is None else 0.04 + 0.76 * value
            parts.append(
                f'<rect class=heat x="{x:.1f}" y="{y}" width="{cell_w - 2}" height="{cell_h - 2}" fill-opacity="{shade:.2f}"/>'
            )
            if value is not None:
                parts.append(_text(x + cell_w / 2 - 1, y + 14, f"{100 * value:.0f}"))
    return "".join([*parts, "</svg>"])


def bars(
    row_names: Sequence[str],
    parts_of: Sequence[Mapping[str, float]],
    kinds: Sequence[str],
    unit: str,
    what: str = "time by stage",
) -> str:
    """Horizontal bars made of `kinds` on top of one another, with their sums."""
    longest = max([len(n) for n in row_names], default=0)
    left, width, step = 16 + 6.6 * longest, 420, 24
    most = max((sum(p.values()) for p in parts_of), default=0) or 1.0
    out = [_open(left + width + 90, step * len(row_names) + 8, f"{what}, {unit}")]
    for r, (name, split) in enumerate(zip(row_names, parts_of, strict=True)):
        x, y = left, 4 + step * r
        out.append(_text(left - 8, y + 14, name, "end"))
        for n, kind in enumerate(kinds):
            value = split.get(kind, 0.0)
            w = width * value / most
            box = f'class="fill k{n}" x="{x:.1f}" y="{y}" width="{w:.1f}" height="{step - 6}"'
            out.append(f"<rect {box}><title>{html.escape(kind)}: {value:.3g} {unit}</title></rect>")
            x += w
        out.append(_text(x + 6, y + 14, f"{sum(split.values()):.3g} {unit}", "start"))
    return "".join([*out, "</svg>"])


def _fits(kind: str, value: float) -> bool:
    return value > 0 or not kind.startswith("log")


def _tick(kind: str, value: float) -> str:
    return f"{value:.0%}" if kind == "share" else f"{value:.6g}"


def _axis(kind: str, values: Sequence[float]) -> Axis:
    if kind == "share":
        return lambda value: value, [0, 0.25, 0.5, 0.75, 1]
    return _linear_axis(values) if kind == "linear" else _log_axis(values, kind)


def _log_axis(values: Sequence[float], kind: str) -> Axis:
    base, log = {"log2": (2.0, math.log2), "log10": (10.0, math.log10)}[kind]
    low, high = math.floor(log(min(values))), math.ceil(log(max(values)))
    high = max(high, low + 1)
    return lambda value: (log(value) - low) / (high - low), [base**e for e in range(low, high + 1)]


def _linear_axis(values: Sequence[float]) -> Axis:
    most = max(values) or 1.0
    power = 10.0 ** math.floor(math.log10(most))
    step = next(s for s in (power / 5, power / 2, power, 2 * power) if most / s <= 6)
    count = math.ceil(most / step - 1e-9)
    return lambda y: y / (step * count), [step * i for i in range(count + 1)]


def _open(width: float, height: float, label: str) -> str:
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{html.escape(label)}">'


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'
