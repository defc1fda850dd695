"""Weights of sparse rollouts, against a scalar reference; and what they are for: a gradient of the dense policy."""

from __future__ import annotations

import math

import pytest
import torch

from tsa_compile.rl.corrections import CAPS, effective_size, importance_weights, ratios


@pytest.fixture
def drawn():
    g = torch.Generator().manual_seed(3)
    dense, sparse = (-3 * torch.rand(5, 9, generator=g) for _ in range(2))
    return dense, sparse, torch.arange(9) < torch.tensor([9, 4, 1, 0, 7])[:, None]


def by_hand(dense, sparse, mask, cap, level, drop):
    rows = []
    for p, q, there in zip(dense.tolist(), sparse.tolist(), mask.tolist(), strict=True):
        n = sum(there)
        each = [math.exp(a - b) for a, b in zip(p, q, strict=True)][:n]
        each = [math.prod(each)] * n if level == "sequence" else each
        rows.append([(0.0 if drop else cap) if w > cap else w for w in each] + [1.0] * (len(p) - n))
    return torch.tensor(rows)


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("cap", [2.0, 3.0])
def test_weights_are_those_of_a_loop(drawn, cap, level, drop):
    dense, sparse, mask = drawn
    found = importance_weights(*drawn, cap, level, drop)
    torch.testing.assert_close(found.weights, by_hand(dense, sparse, mask, cap, level, drop))
    assert torch.equal(found.over, (ratios(*drawn, level) > cap) & mask)
    assert found.over.any()
    assert not found.over.all()
    own = found.weights[mask].tolist() if level == "token" else [found.weights[n, 0].item() for n in (0, 1, 2, 4)]
    kish = sum(own) ** 2 / (len(own) * sum(w * w for w in own))
    assert found.effective == pytest.approx(kish)
    assert 0 < kish < 1


def test_off_changes_no_bit(drawn):
    loss = torch.randn(5, 9)
    off = importance_weights(*drawn, cap=None)
    assert torch.equal(loss * off.weights, loss)
    assert not off.over.any()
    assert off.effective == effective_size(ratios(*drawn), drawn[2])  # what one would pay for them
    assert CAPS == {"code": 3.0, "math": None, "dapo": 2.0}


def test_equal_policies_need_no_weights(drawn):
    dense, _, mask = drawn
    same = importance_weights(dense, dense, mask)
    assert torch.equal(same.weights, torch.ones(5, 9))
    assert same.effective == 1.0
    assert effective_size(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)) == 0.0


def test_the_expected_gradient_is_that_of_the_dense_policy():
    """Over all tokens, with no cap in the way: sum_v q(v) w(v) r(v) grad log p(v) is the gradient of sum_v p(v) r(v)."""
    logits = torch.randn(1, 6, dtype=torch.float64, requires_grad=True)
    q = torch.log_softmax(torch.randn(1, 6), -1)
    rewards, mask = torch.randn(6, dtype=torch.float64), torch.ones(6, 1, dtype=torch.bool)
    p = torch.log_softmax(logits, -1)
    (want,) = torch.autograd.grad((p.exp() * rewards).sum(), logits, retain_graph=True)
    weights = importance_weights(p.mT, q.mT, mask, cap=1e9).weights[:, 0]
    (found,) = torch.autograd.grad((q[0].exp() * weights * rewards * p[0]).sum(), logits)
    torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-5)


def test_what_is_wrong_is_named(drawn):
    for change, message in (({"cap": 0}, "cap must be above 0, or None"), ({"level": "row"}, "level must be one of")):
        with pytest.raises(ValueError, match=message):
            importance_weights(*drawn, **change)
