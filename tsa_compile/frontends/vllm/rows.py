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


class Split(NamedTuple):
    """A batch with sparse rows.

    Args:
        rows: the sparse ones.
        dense: for each run of other rows: its first token, the one behind its last, and the parent's metadata.
        block_table: int32 `[rows, blocks]`, of the whole batch.
        tokens, requests: of the whole batch, for counts.
    """

    rows: tuple[SparseRow, ...]
    dense: tuple[tuple[int, int, Any], ...]
    block_table: Tensor
    tokens: int
    requests: int


def split(common: Any, min_rows: int, min_context: int, build: Callable[[Any], Any]) -> Split | None:
    """How the batch is told apart; None: no row is sparse.

    Args:
        common: vLLM's `CommonAttentionMetadata`.
        min_rows: a sparse row has more new tokens than that.
        min_context: and at least so many in all.
        build: makes the parent's metadata.
    """
    if common.max_query_len <= min_rows or common.causal is not True:
        return None
    starts = common.query_start_loc_cpu.tolist()
    rows = sparse_rows(starts, host_lengths(common), min_rows, min_context)
    if not rows:
        return None
    runs = dense_runs(len(starts) - 1, [row.request for row in rows])
    dense = [(starts[a], starts[b], build(part(common, starts, a, b))) for a, b in runs if starts[a] < starts[b]]
    return Split(tuple(rows), tuple(dense), common.block_table_tensor, starts[-1], sum(map(int.__lt__, starts, starts[1:])))


def sparse_rows(starts: Sequence[int], lengths: Sequence[int], min_rows: int, min_context: int) -> list[SparseRow]:
    """The rows with more than `min_rows` new tokens and at least `min_context` in all."""
    rows = (SparseRow(i, a, b, lengths[i]) for i, (a, b) in enumerate(itertools.pairwise(starts)))
    return [row for row in rows if row.end - row.begin > min_rows and row.k_len >= min_context]


def dense_runs(rows: int, sparse: Sequence[int]) -> list[tuple[int, int]]:
    """(first row, the one behind the last) of the runs that lie between the sparse rows."""
    edges = [-1, *sparse, rows]
    return [(a + 1, b) for a, b in itertools.pairwise(edges) if a + 1 < b]


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
