"""What follows an attention finds the strides that it was traced with."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.passes.graphs import KEEP_ALL, Wrapped, by_dynamo, by_export
from tsa_compile.passes.facts.names import op_name
from tsa_compile.passes.pipeline import run_pipeline

B, H, L, D = 2, 4, 40, 16


def sdpa(q):
    return F.scaled_dot_product_attention(q, q, q, is_causal=True)


def viewed(q):
    return sdpa(q).view(B * H, L, D)


def strided(q):
    return sdpa(q).as_strided((B * H, L, D), (L * D, D, 1))


def strided_later(q):
    """Elementwise operations keep the layout."""
    return (sdpa(q) * 2).as_strided((B * H, L, D), (L * D, D, 1))


def read(q):
    out = sdpa(q)
    return out * out.stride(1)


def split(q):
    return torch.cat([x.view(B * H, L // 2, D) for x in sdpa(q).view(B, H, 2, L // 2, D).unbind(2)])


def returned(q):
    return sdpa(q)


def transposed(q):
    return sdpa(q).transpose(1, 2).contiguous().view(B, L, H * D)


def reshaped(q):
    return sdpa(q).transpose(1, 2).reshape(B, L, H * D) @ torch.ones(H * D, 3)


CASES = [viewed, strided, strided_later, read, split, returned, transposed, reshaped]


@pytest.mark.parametrize("trace", [by_dynamo, by_export])
@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__)
def test_the_result_is_that_of_the_dense_graph(function, trace):
    q = torch.randn(B, H, L, D)
    outcome = trace(function, q)
    assert outcome.replaced == [True]
    expected = function(q)
    torch.testing.assert_close(outcome.result, expected, atol=1e-5, rtol=1e-5)
    assert outcome.result.stride() == expected.stride()


def test_a_layout_of_its_own_is_kept():
    """The attention of a graph need not be contiguous: here it lies as [L, B, H, D]."""

    def function(q):
        mask = torch.full((L, L), float("-inf")).triu(1)
        weights = torch.softmax(torch.einsum("lbhd,mbhd->bhlm", q, q) * D**-0.5 + mask, -1)
        return torch.einsum("bhlm,mbhd->lbhd", weights, q).as_strided((L, B * H, D), (B * H * D, D, 1))

    q = torch.randn(L, B, H, D)
    outcome = by_dynamo(function, q)
    assert outcome.replaced == [True], outcome.reasons
    torch.testing.assert_close(outcome.result, function(q), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("function", "copies"), [(transposed, 0), (reshaped, 0), (viewed, 1)], ids=["transposed", "reshaped", "viewed"]
)
def test_a_copy_is_made_only_where_it_matters(function, copies):
    with torch.no_grad():
        program = torch.export.export(Wrapped(function), (torch.randn(B, H, L, D),))
        before = clones(program.graph)
        run_pipeline(program.graph_module, lambda site: KEEP_ALL)
    assert clones(program.graph) - before == copies


def clones(graph) -> int:
    return sum(op_name(node) == "clone" for node in graph.nodes)


def test_vmap_stays_dense_with_a_reason():
    """Under vmap the operands that a graph shows lack the dimension that is mapped."""

    def function(x):
        return torch.vmap(sdpa)(x)

    x = torch.randn(3, B, H, L, D)
    outcome = by_dynamo(function, x)
    assert outcome.replaced == [False]
    assert "torch.vmap" in outcome.reasons[0]
    torch.testing.assert_close(outcome.result, function(x))
