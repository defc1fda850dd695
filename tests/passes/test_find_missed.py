"""Attention that is not read is a warning that says what was seen; what is no attention is none."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tests.passes.graphs import KEEP_ALL, by_dynamo
from tsa_compile.backend import Backend
from tsa_compile.plan import Plan

H, L, D = 4, 11, 16


def test_a_graph_break_inside_attention_is_a_warning():
    def function(q, k, v):
        scores = q @ k.mT
        torch._dynamo.graph_break()
        return scores.masked_fill(~torch.ones(L, L, dtype=torch.bool).tril(), -math.inf).softmax(-1) @ v

    torch._dynamo.reset()
    backend = Backend(Plan(KEEP_ALL), "eager")
    with torch.no_grad():
        torch.compile(function, backend=backend)(*(torch.randn(2, H, L, D) for _ in range(3)))
    assert backend.report.sites == []
    assert "scores come from another graph" in backend.report.warnings[0]


def test_a_softmax_of_something_else_is_no_warning():
    outcome = by_dynamo(
        lambda x, w: (F.linear(x, w).softmax(-1) @ x, torch.topk(x.softmax(-1), 2)), torch.randn(2, 3, L, L), torch.eye(L)
    )
    assert outcome.warnings == []


@pytest.mark.parametrize(("name", "warned"), [("attention", True), ("mixer", False)])
def test_products_of_an_attention_module_without_attention_are_a_warning(name, warned):
    """As where a graph break leaves the softmax outside of all graphs."""

    class Scores(torch.nn.Module):
        def forward(self, x):
            return x.cos() @ x.sin().mT

    model = torch.nn.Module()
    model.add_module(name, Scores())
    model.forward = lambda x: getattr(model, name)(x)
    outcome = by_dynamo(model, torch.randn(2, H, L, D))
    assert bool(outcome.warnings) == warned
    assert not warned or "attention: 1 matmul, but no attention around it" in outcome.warnings[0]
