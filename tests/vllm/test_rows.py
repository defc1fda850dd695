"""A step's batch told apart: sparse rows, and the runs of rows between them, that are the parent's."""

from __future__ import annotations

import dataclasses

import torch

from tsa_compile.frontends.vllm import rows
from tsa_compile.frontends.vllm.counts import BY_LAYER, add, summary


@dataclasses.dataclass
class Batch:
    """As vLLM's CommonAttentionMetadata."""

    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: torch.Tensor
    slot_mapping: torch.Tensor
    causal: bool = True
    is_prefilling: torch.Tensor | None = None
    seq_lens_cpu_upper_bound: torch.Tensor | None = None
    logits_indices_padded: torch.Tensor | None = None
    _num_computed_tokens_cache: torch.Tensor | None = None


def batch(new, lengths):
    starts = torch.tensor([0, *new]).cumsum(0).int()
    table, tokens = torch.arange(len(new) * 4).view(-1, 4).int(), torch.arange(int(starts[-1]))
    numbers = (len(new), len(tokens), max(new), max(lengths))
    upper = torch.tensor(lengths)
    row = dict(seq_lens_cpu_upper_bound=upper, logits_indices_padded=torch.tensor([1]))
    return Batch(starts, starts, upper, *numbers, table, tokens, **row)


def test_a_batch_is_told_apart():
    common = batch([1, 300, 5, 1, 200, 129, 0], [900, 300, 1000, 4, 1200, 129, 0])
    found = rows.split(common, rows.Wants(128, 200), lambda run: run)
    assert found.rows == ((1, 1, 301, 300), (4, 307, 507, 1200))
    assert [(run.begin, run.end) for run in found.dense] == [(0, 1), (301, 307), (507, 636)]
    assert (found.tokens, found.requests) == (636, 6)
    middle = found.dense[1].metadata
    assert middle.query_start_loc.tolist() == middle.query_start_loc_cpu.tolist() == [0, 5, 6]
    assert (middle.seq_lens.tolist(), middle.num_reqs, middle.num_actual_tokens) == ([1000, 4], 2, 6)
    assert (middle.max_query_len, middle.max_seq_len) == (5, 1000)
    assert torch.equal(middle.block_table_tensor, common.block_table_tensor[2:4])
    assert torch.equal(middle.slot_mapping, torch.arange(301, 307))
    assert middle.logits_indices_padded is None
    assert middle.causal is True


def test_batches_without_a_sparse_row_are_the_parents():
    def never(run):
        raise AssertionError(run)

    assert rows.split(batch([1, 1, 128], [4000, 5000, 9000]), rows.Wants(128, 0), never) is None
    assert rows.split(batch([300], [300]), rows.Wants(128, 301), never) is None
    assert rows.split(dataclasses.replace(batch([300], [300]), causal=torch.tensor([False])), rows.Wants(128, 0), never) is None


def test_every_row_belongs_to_one_part():
    for seed in range(50):
        g = torch.Generator().manual_seed(seed)
        new = torch.randint(0, 4, (9,), generator=g).pow(6).clamp(max=300).tolist()
        found = rows.split(batch(new, new), rows.Wants(128, 0, decode=True), lambda run: run)
        spans = sorted([(r.begin, r.end) for r in (*found.rows, *found.decode, *found.dense)])
        assert [a for a, _ in spans] == [0, *[b for _, b in spans][:-1]]
        assert spans[-1][1] == sum(new)


def test_counts():
    BY_LAYER.clear()
    found = rows.split(batch([1, 300], [900, 300]), rows.Wants(128, 200), lambda run: run)
    for _ in range(2):
        add("a", found)
    assert dataclasses.astuple(BY_LAYER["a"]) == (2, 4, 602, 2, 600, 0)
    assert summary("a") == "a: 2 sparse of 4 rows in 2 steps with any, 99.7% of their 602 tokens"


def test_decode_rows_are_runs():
    found = rows.split(batch([1, 1, 300, 1, 5, 0], [900, 7, 300, 4, 9, 0]), rows.Wants(128, 200, decode=True), lambda run: run)
    assert [run[:4] for run in found.decode] == [(0, 2, 0, 2), (3, 4, 302, 303)]
    assert [run[:4] for run in found.dense] == [(4, 6, 303, 308)]
    assert [row.request for row in found.rows] == [2]
    alone = rows.split(batch([1, 1, 300], [9, 9, 300]), rows.Wants(None, 0, decode=True), lambda run: run)
    last = dataclasses.replace(batch([1, 1], [9, 9]), is_prefilling=torch.tensor([True, False]))
    assert rows.split(last, rows.Wants(None, 0, decode=True), lambda run: run).decode[0][:2] == (1, 2)
    assert (len(alone.rows), alone.decode[0][:2], alone.dense[0][:2]) == (0, (0, 2), (2, 3))
