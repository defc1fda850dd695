"""Budgets of pages that grow with the position, as published by Sparrow (arXiv 2606.08446): data for `PageSparse(schedule=...)`.

Each was fitted there to one model of Qwen3 (1.7B to 14B) and one threshold of the acceptance statistic (`learn/acceptance.py`):
pages of 16 tokens beside the reserved ones, an entry for each 125 pages (2,000 tokens) of context; the last holds from there on.
"""

from __future__ import annotations

from collections.abc import Mapping

_RUNS = {  # pages, x how many entries
    "1.7b-0.75": "29x2 45x2 61x2 77x2 93x12",
    "1.7b-0.80": "29 45 61 77 93x2 125x3 157x11",
    "1.7b-0.83": "29 61 77 93 125x2 157x2 189x12",
    "1.7b-0.86": "29 61 93x2 125 157 189 221x2 253x11",
    "1.7b-0.88": "45 77 125 157x2 189 221 253x2 317x11",
    "1.7b-0.90": "45 93 157 189 221 253 317x2 381x12",
    "1.7b-0.92": "61 125 189 221 253 317 381x2 445 509x11",
    "1.7b-0.94": "77 157 221 317 381 445 509x2 637 765x11",
    "4b-0.75": "29x4 45 61 77 93 125x4 157x6 189x2",
    "4b-0.80": "29x2 45 61 77 93 125 157x3 189 221x9",
    "4b-0.86": "29 45 61 77 93 125 157 221 253x2 317x4 381x4 509x2",
    "4b-0.88": "29 61 93 125 157 189 253 317 381 445x2 509x3 637x6",
    "4b-0.90": "45 77 125 157 189 253 317 445 637 765x6 893x5",
    "4b-0.92": "45 93 157 189 253 381 445 765 893 1021x2 1149x9",
    "8b-0.75": "29x3 45x2 77x3 93x4 125x6 157x2",
    "8b-0.80": "29x2 45 61 77 93 125x2 157x2 189x3 221x4 253x3",
    "8b-0.86": "29 45 61 77 125 157 189 253x4 317x6 385 445x2",
    "8b-0.87": "29 61 77 93 157 189 221 317x4 381x5 445x2 509x2",
    "8b-0.92": "45 93 125 189 253 445 509 637 765x3 893x5 1021x4",
    "14b-0.86": "29 45 77 125 253 381x10 509 637x2 893x2",
}
SINKS, RECENT, DENSE_LAYERS = 1, 2, 2  # pages reserved beside, and first layers that read everything: as the scripts have them


def _entries(runs: str) -> tuple[int, ...]:
    pairs = (run.partition("x") for run in runs.split())
    return tuple(int(pages) for pages, _, times in pairs for _ in range(int(times or 1)))


SCHEDULES: Mapping[str, tuple[int, ...]] = {f"sparrow-{name}": _entries(runs) for name, runs in _RUNS.items()}
