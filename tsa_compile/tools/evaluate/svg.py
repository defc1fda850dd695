"""Plots as inline SVG that follow the page's colours, light or dark."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence

Point = tuple[float, float, str]  # x, y, what it is (shown on hover)
_W, _H, _LEFT, _RIGHT, _BOTTOM, _TOP = 480, 310, 66, 24, 44, 14


def curves(series: Mapping[str, Sequence[Point]], x_label: str, y_label: str, log: bool = False) -> str:
    """Lines with dots: x in [0, 1] shown in percent; y linear from 0, or logarithmic to base 10 (zeros are left out)."""
    series = {n: [p for p in ps if not log or p[1] > 0] for n, ps in series.items()}
    values = [p[1] for ps in series.values() for p in ps]
    if not values:
        return "<p>nothing measured</p>"
    scale, ticks = _log_axis(values) if log else _linear_axis(values)
    width, height = _W - _LEFT - _RIGHT, _H - _TOP - _BOTTOM
    at_x: Callable[[float], float] = lambda x: _LEFT + width * x  # noqa: E731
    at_y: Callable[[float], float] = lambda y: _TOP + height * (1 - scale(y))  # noqa: E731
    parts = [_open(_W, _H, f"{y_label} against {x_label}")]
    for y in ticks:
        parts.append(f'<path class=grid d="M{_LEFT} {at_y(y):.1f}h{width}"/>')
        parts.append(_text(_LEFT - 6, at_y(y) + 4, f"{y:g}", "end"))
    for x in (0, 0.25, 0.5, 0.75, 1):
        parts.append(_text(at_x(x), _H - _BOTTOM + 16, f"{x:.0%}"))
    parts.append(_text(_LEFT + width / 2, _H - 8, x_label))
    parts.append(
        f'<text transform="translate(14 {_TOP + height / 2:.0f}) rotate(-90)" text-anchor=middle>{html.escape(y_label)}</text>'
    )
    for n, points in enumerate(series.values()):
        ordered = sorted(points)
        line = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y, _ in ordered)
        parts.append(f'<polyline class="line c{n}" points="{line}"/>')
        for x, y, name in ordered:
            dot = f'class="dot c{n}" cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="4"'
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


def bars(row_names: Sequence[str], parts_of: Sequence[Mapping[str, float]], kinds: Sequence[str], unit: str) -> str:
    """Horizontal bars made of `kinds` on top of one another, with their sums."""
    longest = max([len(n) for n in row_names], default=0)
    left, width, step = 16 + 6.6 * longest, 420, 24
    most = max((sum(p.values()) for p in parts_of), default=0) or 1.0
    out = [_open(left + width + 90, step * len(row_names) + 8, f"time by stage, {unit}")]
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


def _log_axis(values: Sequence[float]) -> tuple[Callable[[float], float], list[float]]:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    return lambda y: (math.log10(y) - low) / (high - low), [10.0**e for e in range(low, high + 1)]


def _linear_axis(values: Sequence[float]) -> tuple[Callable[[float], float], list[float]]:
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
