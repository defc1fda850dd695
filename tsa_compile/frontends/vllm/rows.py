"""A step's batch, told apart: the rows that are sparse, and the runs of rows between them, which the parent computes.

Only numbers that the host has are read, so that nothing waits for the device and all ranks decide alike.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

Tensor = torch.Tensor


class SparseRow(NamedTuple):
    """A request's new tokens in this step.

    Args:
        request: its row in the batch.
        begin, end: its tokens among those of the step.
        k_len: tokens that it has in all, cached ones and these.
    """

    request: int
    begin: int
    end: int
    k_len: int


class Run(NamedTuple):
    """Rows that follow each other.

    Args:
        first, last: the first row, and the one behind the last.
        begin, end: their tokens among those of the step.
        metadata: the parent's, of these rows alone; None: they are not the parent's.
    """

    first: int
    last: int
    begin: int
    end: int
    metadata: Any = None


class Wants(NamedTuple):
    """What a layer does itself.

    Args:
        min_rows: rows with more new tokens than that, if they have
        min_context: at least so many in all; None: no row in prefill.
        decode: rows of one new token.
    """

    min_rows: int | None
    min_context: int
    decode: bool = False


class Split(NamedTuple):
    """A batch of which some rows are sparse.

    Args:
        rows: those in prefill, each by itself.
        decode: runs of decode steps.
        dense: runs of the other rows.
        block_table: int32 `[rows, blocks]`, of the whole batch.
        lengths: int32 `[rows]`, tokens in all, on the device.
        tokens, requests: of the whole batch, for counts.
    """

    rows: tuple[SparseRow, ...]
    decode: tuple[Run, ...]
    dense: tuple[Run, ...]
    block_table: Tensor
    lengths: Tensor
    tokens: int
    requests: int


def split(common: Any, wants: Wants, build: Callable[[Any], Any]) -> Split | None:
    """How the batch is told apart; None: no row is sparse.

    Args:
        common: vLLM's `CommonAttentionMetadata`.
        wants: what the layer does.
        build: makes the parent's metadata.
    """
    long = wants.min_rows is not None and common.max_query_len > wants.min_rows
    if common.causal is not True or not (long or wants.decode):
        return None
    starts = common.query_start_loc_cpu.tolist()
    rows = sparse_rows(starts, host_lengths(common), wants.min_rows or 0, wants.min_context) if long else []
    decode = decode_runs(starts, common.is_prefilling) if wants.decode else []
    if not rows and not decode:
        return None
    runs = between(len(starts) - 1, sorted([(x.request, x.request + 1) for x in rows] + [(x.first, x.last) for x in decode]))
    dense = [Run(a, b, starts[a], starts[b], build(part(common, starts, a, b))) for a, b in runs if starts[a] < starts[b]]
    requests = sum(map(int.__lt__, starts, starts[1:]))
    return Split(tuple(rows), tuple(decode), tuple(dense), common.block_table_tensor, common.seq_lens, starts[-1], requests)


def sparse_rows(starts: Sequence[int], lengths: Sequence[int], min_rows: int, min_context: int) -> list[SparseRow]:
    """The rows with more than `min_rows` new tokens and at least `min_context` in all."""
    rows = (SparseRow(i, a, b, lengths[i]) for i, (a, b) in enumerate(itertools.pairwise(starts)))
    return [row for row in rows if row.end - row.begin > min_rows and row.k_len >= min_context]


def decode_runs(starts: Sequence[int], prefilling: Tensor | None) -> list[Run]:
    """Runs of rows with one new token that is not the prompt's; `prefilling`: bool `[rows]` on the host, or None."""
    ends = [False] * len(starts) if prefilling is None else prefilling.tolist()
    steps = [b - a == 1 and not ends[i] for i, (a, b) in enumerate(itertools.pairwise(starts))]
    runs, first = [], 0
    for one, group in itertools.groupby(steps):
        last = first + len(list(group))
        if one:
            runs.append(Run(first, last, starts[first], starts[last]))
        first = last
    return runs


def between(rows: int, taken: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(first row, the one behind the last) of the runs that lie between those that are taken."""
    ends, firsts = [0, *(last for _, last in taken)], [*(first for first, _ in taken), rows]
    return [(a, b) for a, b in zip(ends, firsts, strict=True) if a < b]


def host_lengths(common: Any) -> list[int]:
    """Tokens of each row, which are exact for rows in prefill.

    Raises:
        RuntimeError: this engine keeps them on the device only.
    """
    for name in ("seq_lens_cpu_upper_bound", "_seq_lens_cpu"):
        lengths = getattr(common, name, None)
        if lengths is not None:
            return lengths.tolist()
    if common.seq_lens.device.type == "cpu":
        return common.seq_lens.tolist()
    raise RuntimeError("tsa_compile: this engine does not say on the host how long rows are; use its own attention backend")


# Fields of CommonAttentionMetadata by row, in all versions; what is not here or set below is None or as it was.
_BY_ROW = ("seq_lens", "block_table_tensor", "is_prefilling", "seq_lens_cpu_upper_bound", "_seq_lens_cpu", "req_idx",
           "_num_computed_tokens_cpu")  # fmt: skip
_BY_TOKEN = ("slot_mapping", "positions")
_AS_IT_WAS = ("causal",)


def part(common: Any, starts: Sequence[int], first: int, last: int) -> Any:
    """The batch of rows first..last-1, as the engine would have made it."""
    begin, end = starts[first], starts[last]
    cut = {name: slice(first, last) for name in _BY_ROW} | {name: slice(begin, end) for name in _BY_TOKEN}
    lengths = host_lengths(common)[first:last]
    made = {
        "query_start_loc": common.query_start_loc[first : last + 1] - begin,
        "query_start_loc_cpu": common.query_start_loc_cpu[first : last + 1] - begin,
        "num_reqs": last - first,
        "num_actual_tokens": end - begin,
        "max_query_len": max(b - a for a, b in itertools.pairwise(starts[first : last + 1])),
        "max_seq_len": max(lengths),
    }
    for field in dataclasses.fields(common):
        value = getattr(common, field.name)
        if field.name in cut:
            made[field.name] = None if value is None else value[cut[field.name]]
        elif field.name not in made and field.name not in _AS_IT_WAS:
            made[field.name] = None
    return dataclasses.replace(common, **made)
