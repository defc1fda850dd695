"""Every hand-made mask ends proven, and then the replacement is exact, or dense with the reason that was expected."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.passes.graphs import Outcome, by_dynamo, by_export
from tests.passes.mask_cases import CASES, MaskCase

BATCH, HEADS, KV_HEADS, LENGTH, DIM = 2, 4, 2, 19, 16
names = pytest.mark.parametrize("name", CASES)
dynamic = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


def inputs(case: MaskCase) -> tuple[Tensor, Tensor]:
    """Q, K and V in one tensor `[B, H + 2 Hk, Lk, D]`, so that all lengths are one symbol, as in a model; padding `[B, Lk]`."""
    pad = torch.ones(BATCH, LENGTH + case.past, dtype=torch.bool)
    pad[0, :3] = False
    return torch.randn(BATCH, HEADS + 2 * KV_HEADS, LENGTH + case.past, DIM), pad


def unpack(case: MaskCase, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = x.split([HEADS, KV_HEADS, KV_HEADS], 1)
    return q[:, :, case.past :], k, v


def function(case: MaskCase) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, pad: case.function(*unpack(case, x), pad)


def check(case: MaskCase, outcome: Outcome, x: Tensor, pad: Tensor) -> None:
    assert len(outcome.replaced) == 1
    if case.reason is None:
        assert outcome.replaced == [True], outcome.reasons
    else:
        assert outcome.replaced == [False]
        assert case.reason in outcome.reasons[0]
    expected = function(case)(x, pad)
    rows = seen_rows(case, x, pad) & ~expected.isnan().any(-1)  # a row without a key may be anything
    torch.testing.assert_close(outcome.result[rows], expected[rows], atol=2e-5, rtol=2e-5)


def seen_rows(case: MaskCase, x: Tensor, pad: Tensor) -> Tensor:
    """`[B, H, Lq]`: which queries see a key at all; what the others get is left open by every implementation."""
    q, _, _ = unpack(case, x)
    if not case.padded:
        return torch.ones(q.shape[:3], dtype=torch.bool)
    seen = pad.cumsum(-1)[:, case.past :] > 0
    return seen[:, None].expand(q.shape[:3])


@names
@dynamic
def test_dynamo(name, dynamic):
    case = CASES[name]
    x, pad = inputs(case)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 2)
        torch._dynamo.mark_dynamic(pad, 1)
    check(case, by_dynamo(function(case), x, pad), x, pad)


@names
@dynamic
def test_export(name, dynamic):
    case = CASES[name]
    x, pad = inputs(case)
    length = torch.export.Dim("length", min=8, max=4096)
    try:
        outcome = by_export(function(case), x, pad, dynamic_shapes=({2: length}, {1: length}) if dynamic else None)
    except torch._dynamo.exc.UserError as error:
        if torch.__version__ >= "2.13" or "Constraints violated" not in str(error):
            raise
        pytest.skip("this torch.export refuses repeated heads of dynamic length")
    check(case, outcome, x, pad)
