"""Rows at once, with gradients: they read what the operators of decode steps choose, and give the steps' logits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import tsa_compile as tsa
from tests.cache.models import cache_name, tiny, token_ids
from tsa_compile.cache.head_index import HeadIndex
from tsa_compile.generate.scoring import positions_of
from tsa_compile.index_weights import attach_indexes, load_indexes, save_indexes
from tsa_compile.kernels.types import Rotation
from tsa_compile.learn.sparse_rows import keys_read, sparse_logits

PATH, HEADS = "model.layers.{}.self_attn", ((1,), (0, 3))
ROLES = tsa.HeadSplit((), sinks=4, window=20)
POLICIES = [
    tsa.PageSparse(schedule=(1, 3), sinks=1, recent=2),
    tsa.PageSparse(keep=(0.5, 0.3)),
    tsa.PageSparse(pages=5, sinks=0, recent=1),
    tsa.PageSparse(keep=1.0),
    tsa.Exact(),
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_rows_read_what_the_operators_choose(policy):
    """Row by row, by `tsa::select_pages` over a cache of so many rows; a left-padded batch."""
    q, k = torch.randn(2, 4, 150, 8), torch.randn(2, 2, 150, 8)
    there = torch.arange(150) >= torch.tensor([[0], [37]])
    found = keys_read(policy, q, k, there, 100, 0.3).expand(-1, 2, -1, -1)
    for row in (100, 111, 112, 127, 128, 149):
        want = torch.zeros(2, 2, 150, dtype=torch.bool)
        want[..., : row + 1] = there[:, None, : row + 1]
        if isinstance(policy, tsa.PageSparse):
            read = torch.zeros(2, 2, 160, dtype=torch.bool).unflatten(-1, (10, 16))
            for b, g, pages in chosen(policy, q[:, :, row : row + 1], k[:, :, : row + 1], there[:, : row + 1], 0.3):
                read[b, g, pages] = True
            want &= read.flatten(2)[..., :150]
        assert torch.equal(found[:, :, row - 100], want), row


def chosen(policy, q, k, there, scale):
    """(row of the batch, KV head, pages) by the operators of a decode step."""
    length = k.shape[2]
    sums, counts = torch.ops.tsa.page_sums(k, None, 1, None, None, there)
    view = (counts, None, 1, None, None, length)
    logits, parts = torch.ops.tsa.page_scores(q, sums, *view, scale)
    pages, number = torch.ops.tsa.select_pages(logits, parts, *view, 2, *policy.budget, policy.sinks, policy.recent)
    return [(b, g, pages[b, g, : number[b, g]].long()) for b in range(2) for g in range(2)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random indexes for two layers."""
    model, g = tiny("llama"), torch.Generator().manual_seed(3)
    rotation = Rotation(tuple(model.model.rotary_emb.inv_freq.tolist()), False, 1.0)
    made = [
        (PATH.format(n), HeadIndex(heads, 2, *(torch.randn(2, len(heads), 4, 16, generator=g) * 2), rotation))
        for n, heads in enumerate(HEADS)
    ]
    path = tmp_path_factory.mktemp("index") / "index.safetensors"
    save_indexes(path, made)
    return str(path)


@pytest.mark.parametrize(
    ("prefill", "fields"),
    [
        (True, {"mass": 0.6}),
        pytest.param(False, {"keep": 0.5}, marks=pytest.mark.slow),
        pytest.param(False, {}, marks=pytest.mark.slow),
    ],
    ids=["index, prompts by roles", "page means", "whole context"],
)
def test_rows_by_roles_are_the_steps(weights, prefill, fields):
    """A left-padded batch, a prompt of 140 and 12 steps, in which pages fill; logits of both ways."""
    torch._dynamo.reset()
    model, total, first = tiny("llama"), 152, 140
    policies = [dataclasses.replace(ROLES, retrieval=heads, **fields) for heads in HEADS]
    phases = ("prefill", "decode") if prefill else ("decode",)
    rules = [(PATH.format(n), phase, policy) for phase in phases for n, policy in enumerate(policies)]
    plan = tsa.Plan(prefill=tsa.Dense(), decode=ROLES, rules=rules, weights=weights if "mass" in fields else None)
    ids, mask = token_ids(total, 2), torch.ones(2, total, dtype=torch.long)
    mask[0, :21] = 0
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions_of(mask)}
    tsa.transform(model, plan)
    try:
        cache, steps = {cache_name(model): tsa.Cache(model, 2, total)}, []
        with torch.no_grad():
            for begin, end in [(0, first), *((n, n + 1) for n in range(first, total))]:
                at = given["position_ids"][:, begin:end]
                steps.append(model(ids[:, begin:end], attention_mask=mask[:, :end], position_ids=at, **cache).logits[:, -1])
        by_roles = [site for site in tsa.report(model).sites if site.policy == "HeadSplit"]
        assert len(by_roles) == 2 * len(phases)
        assert all(site.replaced for site in by_roles), by_roles
    finally:
        tsa.restore(model)
    if plan.weights is not None:
        attach_indexes(model, load_indexes(weights))
    found = sparse_logits(model, given, first, plan.bind(model))
    torch.testing.assert_close(found.detach(), torch.stack(steps, 1), atol=2e-4, rtol=1e-4)
    found.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "proj" in name)
