"""How many of the lightest keys may be dropped, and which are the heaviest: what every selection by mass shares, in PyTorch."""

from __future__ import annotations

import math

import torch

Tensor = torch.Tensor
MASS_UNIT = 2.0**52  # one unit of the fixed-point mass is 2**-52


def finite_scores(scores: Tensor) -> Tensor:
    """A score is at most 1, or it is not a finite number because a query or a key is not one: then it is 0, in all forms."""
    return torch.where((scores >= 0) & (scores <= 2), scores, 0.0)


def count_dropped(scores: Tensor, coverage: float) -> int:
    """How many of the lightest tokens together stay below `coverage` of the mass that all heads give.

    Fixed point makes the sums exact, so every implementation counts the same whatever its order of additions.

    Args:
        scores: `[H, N]`, float32 or float64, in [0, 1]; a row sums to at most 1.
        coverage: share of the mass, in (0, 1).
    """
    mass = (scores.double() * MASS_UNIT).long().sum(0)
    threshold = math.ceil(float(mass.sum()) * coverage)
    return int((mass.sort().values.cumsum(0) < threshold).sum())


def largest(scores: Tensor, n: int) -> Tensor:
    """Positions of the `n` largest of each row of `[H, N]`, ascending; among equals the lowest positions win."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return order[:, :n].sort(dim=1).values
