"""Merging partial attentions: the softmax over all keys, in any order; rows and parts that read nothing; both forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsa_compile.kernels import ops  # noqa: F401
from tsa_compile.kernels.common.merge import merge, merge_reference
from tsa_compile.kernels.types import Attended

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-6, torch.float16: 2e-3}  # lse is float32; the result's own rounding


def parts_of(q, k, v, owner, number):
    """(partial attentions over the keys of each owner, 0 to number - 1; the attention over the keys that have one)."""
    scores = (q.double() @ k.double().mT) * 0.3

    def attend(seen):
        hidden = scores.masked_fill(~seen[:, :, None], -torch.inf)
        lse = hidden.logsumexp(-1)
        weights = torch.exp(hidden - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
        out = (weights @ v.double()).to(q.dtype)
        return Attended(out, lse.float())

    return [attend(owner == i) for i in range(number)], attend((owner >= 0) & (owner < number))


def poison(part):
    """Where nothing was read, `out` may hold anything."""
    return Attended(torch.where((part.lse == -torch.inf)[..., None], torch.nan, part.out), part.lse)


@pytest.fixture(params=["reference", "triton"])
def form(request):
    if request.param == "triton":
        pytest.importorskip("triton")
        return merge
    return merge_reference


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow), torch.float16])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_any_tree_of_merges_is_the_attention_over_all_keys(dtype, data):
    pytest.importorskip("triton")
    seed, rows = data.draw(st.integers(0, 999)), data.draw(st.sampled_from([1, 5, 33, 70]))
    dim, number = data.draw(st.sampled_from([1, 16, 24])), data.draw(st.integers(2, 4))
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 3, n, dim, generator=g).to(DEVICE, dtype) for n in (rows, 9, 9))
    owner = torch.randint(-1, number, (2, 3, 9), generator=g).to(DEVICE)  # -1: read by none
    owner[0, 0] = -1
    owner[1, 1] = 0  # the other parts are empty
    parts, whole = parts_of(q, k, v, owner, number)
    for join in (merge, merge_reference):
        left = right = None
        for part in map(poison, parts):
            left = part if left is None else join(left, part)
        for part in map(poison, reversed(parts)):
            right = part if right is None else join(part, right)
        for got in (left, right):
            torch.testing.assert_close(got.out.double(), whole.out.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
            torch.testing.assert_close(got.lse, whole.lse, rtol=1e-5, atol=1e-5)
            assert (got.out[0, 0] == 0).all()
            assert got.out.transpose(1, 2).is_contiguous()


def test_an_empty_part_changes_nothing(form):
    out, lse = torch.randn(1, 2, 40, 8, device=DEVICE), torch.randn(1, 2, 40, device=DEVICE)
    nothing = Attended(torch.full_like(out, torch.nan), torch.full_like(lse, -torch.inf))
    for got in (form(Attended(out, lse), nothing), form(nothing, Attended(out, lse))):
        assert torch.equal(got.out, out)
        torch.testing.assert_close(got.lse, lse, rtol=1e-6, atol=1e-6)


def test_extreme_sums_and_any_strides(form):
    out = torch.randn(1, 40, 2, 8, device=DEVICE).transpose(1, 2)
    lse = torch.tensor([-1e30, -80.0, 0.0, 80.0, 1e30], device=DEVICE).repeat(8).expand(1, 2, 40)
    got = form(Attended(out, lse), Attended(out, lse.flip(2)))
    torch.testing.assert_close(got.out, out, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.lse, torch.logaddexp(lse, lse.flip(2)))


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (1, 2, 0, 8)])
def test_nothing_to_merge(form, shape):
    part = Attended(torch.randn(shape, device=DEVICE), torch.randn(shape[:3], device=DEVICE))
    assert form(part, part).out.shape == shape


def test_the_operator(form):
    part = torch.randn(1, 2, 5, 8, device=DEVICE), torch.randn(1, 2, 5, device=DEVICE)
    torch.library.opcheck(torch.ops.tsa.merge.default, (*part, *part))
    with pytest.raises(ValueError, match="lse of the second part must be float32"):
        torch.ops.tsa.merge(*part, part[0], part[1].half())
    with pytest.raises(ValueError, match="out of the second part must be"):
        torch.ops.tsa.merge(*part, part[0][:, :1], part[1])
