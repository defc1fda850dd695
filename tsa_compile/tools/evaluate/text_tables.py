"""Tables of text, their head first, as Markdown and as HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    head, *body = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body))


def html_table(lines: Sequence[Sequence[str]]) -> str:
    head, *body = ([html.escape(cell) for cell in line] for line in lines)
    rows = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in body)
    heading = "".join(f"<th>{cell}</th>" for cell in head)
    return f"<div class=wide><table><thead><tr>{heading}</tr></thead><tbody>{rows}</tbody></table></div>"
