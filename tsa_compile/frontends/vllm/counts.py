"""How many rows and tokens were sparse, by layer, in this process: host numbers, so that counting costs nothing."""

from __future__ import annotations

import dataclasses
import logging

from tsa_compile.frontends.vllm.rows import Split

log = logging.getLogger("vllm.tsa_compile")


@dataclasses.dataclass
class LayerCounts:
    """Since the process started, of one layer, in steps that had a sparse row.

    Args:
        steps: such steps.
        requests, tokens: of all rows in them.
        sparse_requests, sparse_tokens: of the sparse rows in prefill.
        decode_rows: decode steps that read pages. What a CUDA graph replays is not counted.
    """

    steps: int = 0
    requests: int = 0
    tokens: int = 0
    sparse_requests: int = 0
    sparse_tokens: int = 0
    decode_rows: int = 0


BY_LAYER: dict[str, LayerCounts] = {}


def add(layer: str, split: Split) -> None:
    """Count a step of a layer; logs after 1, 10, 100, ... steps of the first layer that has any."""
    counts = BY_LAYER.setdefault(layer, LayerCounts())
    counts.steps += 1
    counts.requests += split.requests
    counts.tokens += split.tokens
    counts.sparse_requests += len(split.rows)
    counts.sparse_tokens += sum(row.end - row.begin for row in split.rows)
    counts.decode_rows += sum(run.last - run.first for run in split.decode)
    if layer == next(iter(BY_LAYER)) and str(counts.steps).strip("0") == "1":
        log.info("tsa_compile: %s", summary(layer))


def summary(layer: str) -> str:
    """One layer's counts in words."""
    c = BY_LAYER[layer]
    rows = f"{c.sparse_requests} sparse of {c.requests} rows in {c.steps} steps with any"
    steps = f"; {c.decode_rows} decode rows by pages" if c.decode_rows else ""
    return f"{layer}: {rows}, {c.sparse_tokens / max(1, c.tokens):.1%} of their {c.tokens} tokens{steps}"
