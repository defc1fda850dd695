"""Scores through tanh, and softmaxes with sinks: decode takes both; a twin of each that is not quite that stays as it is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tsa_compile as tsa
from tsa_compile.backend import Backend
from tsa_compile.passes.pipeline import run_pipeline

EXACT = tsa.Plan(prefill=tsa.Dense(), decode=tsa.Exact(), verify=tsa.Exact())
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])


def inputs(rows):
    torch.manual_seed(0)
    return torch.randn(2, 4, rows, 16), torch.randn(2, 4, 30, 16), torch.randn(2, 4, 30, 16)


def hidden(rows):
    """As a model adds it: keys behind each row, and the first row's first five."""
    seen = torch.ones(rows, 30, dtype=torch.bool).tril(30 - rows).repeat(2, 1, 1, 1)
    seen[0, ..., :5] = False
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


def run(attention, rows=1, plan=EXACT, mask=None):
    """The one site's report, and the largest difference to the model's own attention."""
    torch._dynamo.reset()
    backend, given = Backend(plan, "eager"), (*inputs(rows), hidden(rows) if mask is None else mask, SINKS)
    with torch.no_grad():
        want = attention(*given)
        got = torch.compile(attention, backend=backend, fullgraph=True)(*given)
    (site,) = backend.sites()
    return site, (got - want).abs().max().item()


VISIBLE = hidden(1)[:, 0, 0] == 0


def padded(attention):
    """With a mask that is proven to be of keys."""

    def of_keys(q, k, v, visible, sinks):
        return attention(q, k, v, torch.where(visible[:, None, None], 0.0, torch.finfo(q.dtype).min), sinks)

    return of_keys


def capped(q, k, v, mask, sinks):
    """Gemma 2's."""
    scores = q @ k.transpose(2, 3) * 0.3
    scores = torch.tanh(scores / 2.0) * 2.0
    return F.softmax(scores + mask, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def capped_unevenly(q, k, v, mask, sinks):
    """Another number within the tanh than outside: the same as another scale."""
    return ((q @ k.mT * 0.3).tanh() * 5.0 + mask).softmax(-1) @ v


def masked_and_capped(q, k, v, mask, sinks):
    return (torch.tanh(q @ k.mT + mask) * 2.0).softmax(-1) @ v


def capped_twice(q, k, v, mask, sinks):
    return (torch.tanh(torch.tanh(q @ k.mT) * 2.0) * 3.0 + mask).softmax(-1) @ v


def capped_by_data(q, k, v, mask, sinks):
    return (torch.tanh(q @ k.mT) * sinks[2] + mask).softmax(-1) @ v


def with_sinks(q, k, v, mask, sinks):
    """gpt-oss's."""
    scores = q @ k.transpose(2, 3) * 0.3 + mask
    column = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    together = torch.cat([scores, column], dim=-1)
    together = together - together.max(dim=-1, keepdim=True).values
    return F.softmax(together, dim=-1, dtype=together.dtype)[..., :-1] @ v


def capped_with_sinks(q, k, v, mask, sinks):
    scores = torch.tanh(q @ k.mT * 0.3) * 4.0 + mask
    return torch.cat([scores, sinks.view(4, 1, 1).expand(2, 4, q.shape[2], 1)], -1).softmax(-1)[..., :-1] @ v


def sinks_of_rows(q, k, v, mask, sinks):
    return torch.cat([q @ k.mT + mask, q[..., :1]], -1).softmax(-1)[..., :-1] @ v


def sinks_scaled(q, k, v, mask, sinks):
    together = torch.cat([q @ k.mT, sinks.view(1, 4, 1, 1).expand(2, 4, q.shape[2], 1)], -1)
    return (together * 0.3).softmax(-1)[..., :-1] @ v


def another_column_cut(q, k, v, mask, sinks):
    together = torch.cat([q @ k.mT + mask, sinks.view(1, 4, 1, 1).expand(2, 4, q.shape[2], 1)], -1)
    return together.softmax(-1)[..., 1:] @ v


def last_key_cut(q, k, v, mask, sinks):
    return (q @ k.mT + mask).softmax(-1)[..., :-1] @ v[:, :, :-1]


@pytest.mark.parametrize("attention", [capped, capped_unevenly, with_sinks, capped_with_sinks])
@pytest.mark.parametrize("rows", [1, 3])
def test_exact_computes_it(attention, rows):
    site, error = run(attention, rows)
    assert site.replaced, site.reason
    assert site.policy == "Exact"
    assert error < 1e-5


@pytest.mark.parametrize("attention", [capped, with_sinks])
@pytest.mark.parametrize("policy", [tsa.PageSparse(1.0), tsa.HeadSplit((0, 1, 2, 3)), tsa.SampledValues(64)])
def test_so_do_other_policies_of_decode(attention, policy):
    """Every page is read, and a row of up to as many positions as samples is exact."""
    site, error = run(padded(attention), plan=tsa.Plan(prefill=tsa.Dense(), decode=policy), mask=VISIBLE)
    assert site.replaced, site.reason
    assert error < 1e-5


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (masked_and_capped, "softcap: scores go through tanh behind their mask"),
        (capped_twice, "softcap: scores go through tanh, twice"),
        (capped_by_data, "softcap: scores go through tanh, times a number that is no constant"),
        (sinks_of_rows, "they are not one number for each head"),
        (sinks_scaled, "attention sinks"),
        (another_column_cut, "attention sinks"),
        (last_key_cut, "attention sinks"),
    ],
)
def test_what_is_not_quite_that_stays(attention, reason):
    site, error = run(attention)
    assert not site.replaced
    assert reason in site.reason
    assert error == 0


@pytest.mark.parametrize(("attention", "reason"), [(capped, "softcap"), (with_sinks, "attention sinks")])
def test_policies_that_do_not_compute_it_say_so(attention, reason):
    for policy in (tsa.Resident(0.5), tsa.PageSparse(1.0, completion=True), tsa.SampledValues(64, "teams")):
        site, _ = run(padded(attention), plan=tsa.Plan(prefill=tsa.Dense(), decode=policy), mask=VISIBLE)
        assert site.replaced == (policy.name != "Resident" and attention is with_sinks)
        assert site.replaced or reason in site.reason
    site, _ = run(attention, 3, tsa.Plan(verify=tsa.Remembered("verify")))
    assert site.replaced == (attention is with_sinks)


@pytest.mark.parametrize("attention", [capped, with_sinks])
def test_in_an_exported_graph(attention):
    from tests.passes.graphs import Wrapped

    given = (*inputs(1), hidden(1), SINKS)
    with torch.no_grad():
        program = torch.export.export(Wrapped(attention).eval(), given)
        found = run_pipeline(program.graph_module, lambda site: tsa.Exact())
        got = program.module()(*given)
    assert [d.reason for d in found.decisions] == [None]
    torch.testing.assert_close(got, attention(*given), atol=1e-5, rtol=1e-5)
