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
    found = rows.split(common, 128, 200, lambda run: run)
    assert found.rows == ((1, 1, 301, 300), (4, 307, 507, 1200))
    assert [(a, b) for a, b, _ in found.dense] == [(0, 1), (301, 307), (507, 636)]
    assert (found.tokens, found.requests) == (636, 6)
    middle = found.dense[1][2]
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

    assert rows.split(batch([1, 1, 128], [4000, 5000, 9000]), 128, 0, never) is None
    assert rows.split(batch([300], [300]), 128, 301, never) is None
    assert rows.split(dataclasses.replace(batch([300], [300]), causal=torch.tensor([False])), 128, 0, never) is None


def test_every_row_belongs_to_one_part():
    for seed in range(50):
        g = torch.Generator().manual_seed(seed)
        new = torch.randint(0, 300, (9,), generator=g).tolist()
        found = rows.split(batch(new, new), 128, 0, lambda run: run)
        spans = sorted([(r.begin, r.end) for r in found.rows] + [(a, b) for a, b, _ in found.dense])
        assert [a for a, _ in spans] == [0, *[b for _, b in spans][:-1]]
        assert spans[-1][1] == sum(new)


def test_counts():
    BY_LAYER.clear()
    found = rows.split(batch([1, 300], [900, 300]), 128, 200, lambda run: run)
    for _ in range(2):
        add("a", found)
    assert dataclasses.astuple(BY_LAYER["a"]) == (2, 4, 602, 2, 600)
    assert summary("a") == "a: 2 sparse of 4 rows in 2 steps with any, 99.7% of their 602 tokens"
