"""Masks of a few query rows of which nothing is proven: `Exact` takes them as the tensors that they are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tsa_compile as tsa
from tsa_compile.backend import Backend

PLAN = tsa.Plan(prefill=tsa.Dense(), decode=tsa.Exact(), verify=tsa.Exact())


def run(attention, rows, *masks, plan=PLAN):
    """The one site's report, and the largest difference to the model's own attention."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, rows, 16), torch.randn(2, 4, 30, 16), torch.randn(2, 4, 30, 16)
    backend = Backend(plan, "eager")
    with torch.no_grad():
        want = attention(q, k, v, *[m.clone() for m in masks])
        got = torch.compile(attention, backend=backend, fullgraph=True)(q, k, v, *masks)
    (site,) = backend.sites()
    return site, (got - want).abs().max().item()


def sdpa(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def added(q, k, v, mask):
    return ((q @ k.transpose(-1, -2)) * 0.25 + mask).softmax(-1) @ v


def hidden(q, k, v, mask):
    return (q @ k.transpose(-1, -2)).masked_fill(mask, -torch.inf).softmax(-1) @ v


def written(q, k, v, mask):
    mask.mul_(2)
    return sdpa(q, k, v, mask)


def under_2d(q, k, v, mask):
    return sdpa(q, k, v, mask[0, 0])


def shown(q, k, v, mask):
    scores = q @ k.transpose(-1, -2)
    return torch.where(mask, scores, torch.finfo(scores.dtype).min).softmax(-1) @ v


def with_slopes(q, k, v, mask):
    """ALiBi as MPT has it: a bias by head and key, then a mask."""
    bias = torch.arange(-29.0, 1.0) * 2.0 ** -torch.arange(1.0, 5.0)[:, None, None]
    return (q @ k.transpose(-1, -2) * 0.25 + bias).masked_fill(~mask, -torch.inf).softmax(-1) @ v


def merged(q, k, v, mask):
    """ALiBi as BLOOM has it: batch and heads are one dimension, but for the mask."""
    rows = q.shape[2]
    bias = (torch.arange(30.0) * 2.0 ** -torch.arange(1.0, 5.0)[:, None]).repeat(2, 1)[:, None]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = bias.baddbmm(q, k.transpose(1, 2), beta=1.0, alpha=0.25).view(2, 4, rows, 30)
    hidden = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(q.dtype).min)
    weights = F.softmax(scores + hidden, dim=-1)
    return weights.view(8, rows, 30) @ v


def weak(q, k, v, mask):
    """-5 is not "hidden"."""
    return (q @ k.transpose(-1, -2)).masked_fill(mask, -5.0).softmax(-1) @ v


MASKS = {
    "a bias by head and key": torch.randn(1, 4, 1, 30),
    "a bias by everything": torch.randn(2, 4, 3, 30),
    "visible keys by row": torch.rand(2, 1, 3, 30) < 0.6,
}


@pytest.mark.parametrize("attention", [sdpa, added])
@pytest.mark.parametrize("mask", MASKS)
def test_taken_as_it_is(attention, mask):
    x = MASKS[mask]
    if attention is added and x.dtype == torch.bool:
        x = torch.zeros(x.shape).masked_fill(~x, -torch.inf)
    site, error = run(attention, 3, x)
    assert site.replaced, site.reason
    assert site.policy == "Exact"
    assert error < 1e-5


def test_a_bias_in_a_decode_step():
    site, error = run(sdpa, 1, torch.randn(1, 4, 1, 30))
    assert site.replaced
    assert error < 1e-5


@pytest.mark.parametrize("attention", [hidden, shown, with_slopes, merged, under_2d])
@pytest.mark.parametrize("rows", [1, 3])
def test_however_it_is_written(attention, rows):
    x = torch.rand(2, 1, rows, 30) < 0.6
    x[..., 0] = attention is not hidden  # no row without a key
    site, error = run(attention, rows, x)
    assert site.replaced, site.reason
    assert error < 1e-5


@pytest.mark.parametrize(
    ("attention", "rows", "mask", "plan"),
    [
        (sdpa, 17, torch.randn(1, 4, 17, 30), PLAN),  # more rows than a step has
        (written, 3, torch.randn(1, 4, 3, 30), PLAN),
        (weak, 3, torch.rand(2, 1, 3, 30) < 0.4, PLAN),
        (merged, 17, torch.rand(2, 1, 17, 30) < 0.4, PLAN),
        (sdpa, 1, torch.randn(1, 4, 1, 30), tsa.Plan(decode=tsa.PageSparse(0.5))),  # a policy that does not take them
    ],
)
def test_left_as_it_is(attention, rows, mask, plan):
    site, error = run(attention, rows, mask, plan=plan)
    assert not site.replaced
    assert any(word in site.reason for word in ("mask", "bias", "hidden scores are replaced by -5.0"))
    assert error == 0
