"""The frame of a report: one HTML page that loads nothing."""

from __future__ import annotations

import html

from tsa_compile.tools import plots

_STYLE = f"""{plots.STYLE}
h2{{margin-top:2em;border-bottom:1px solid var(--grid)}}h3{{margin-bottom:.3em}}p{{max-width:60em}}.soft{{color:var(--soft)}}
.plots{{display:flex;flex-wrap:wrap;gap:1em}}
table{{font-size:13px;border-collapse:collapse;font-variant-numeric:tabular-nums}}
td,th{{padding:.25em .5em;border-bottom:1px solid var(--grid);text-align:right}}
td:first-child,th:first-child{{text-align:left;white-space:nowrap}}th{{font-weight:600;vertical-align:bottom}}
"""


def document(title: str, body: str) -> str:
    """The page; `body` is HTML."""
    head = "<meta charset=utf-8><meta name=viewport content='width=device-width'>"
    head += f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{body}</body></html>\n"
