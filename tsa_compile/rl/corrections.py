"""What makes training on sparse rollouts sound: weights by the ratio of both policies' probabilities, and what they cost.

Tokens were drawn under a sparse policy q, and the gradient is to be that of the dense one, p. Truncated importance sampling
multiplies each token's policy-gradient loss by min(p / q, C), through which no gradient flows (Sparrow, arXiv 2606.08446).
Functions of log-probabilities `[N, T]`, such as `Rollout.dense` and `Rollout.sparse`; `mask` is bool `[N, T]`, true for tokens of
a sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

Tensor = torch.Tensor
#: C as published: of the code example, the math example (off), the DAPO recipe. The paper's text names none; 2.0 is our default.
CAPS: Mapping[str, float | None] = {"code": 3.0, "math": None, "dapo": 2.0}
CAP = 2.0
LEVELS = ("token", "sequence")


class Weights(NamedTuple):
    """Of N samples of T tokens.

    Args:
        weights: float32 `[N, T]`, 1 where `mask` is not.
        over: bool `[N, T]`, tokens whose ratio is above the cap: they were cut, or have weight 0.
        effective: the effective sample size over the number of tokens (or sequences), in (0, 1]; 1: all count alike.
    """

    weights: Tensor
    over: Tensor
    effective: float


def ratios(dense: Tensor, sparse: Tensor, mask: Tensor, level: str = "token") -> Tensor:
    """p / q, float32 `[N, T]`: of each token, or, at level "sequence", of all the row's tokens together; 1 where `mask` is not.

    Raises:
        ValueError: `level` is neither.
    """
    if level not in LEVELS:
        raise ValueError(f"level must be one of {LEVELS}, got {level!r}")
    difference = (dense.detach().float() - sparse.detach().float()).masked_fill(~mask, 0.0)
    if level == "sequence":
        difference = difference.sum(1, keepdim=True).expand_as(difference).masked_fill(~mask, 0.0)
    return difference.exp()


def importance_weights(
    dense: Tensor, sparse: Tensor, mask: Tensor, cap: float | None = CAP, level: str = "token", drop: bool = False
) -> Weights:
    """Weights of the tokens' losses.

    Args:
        cap: C, above 0. None: off, every weight is 1; the effective size is then still that of the ratios as they are.
        level: "token", or "sequence": one ratio for a row, the product of its tokens'.
        drop: what is above the cap gets weight 0, and is not cut to the cap.

    Raises:
        ValueError: `cap` is not above 0, or `level` is neither.
    """
    if cap is not None and not cap > 0:
        raise ValueError(f"cap must be above 0, or None for no weights, got {cap!r}")
    ratio = ratios(dense, sparse, mask, level)
    if cap is None:
        return Weights(torch.ones_like(ratio), torch.zeros_like(mask), effective_size(ratio, mask, level))
    over = (ratio > cap) & mask
    weights = ratio.masked_fill(over, 0.0 if drop else cap)
    return Weights(weights, over, effective_size(weights, mask, level))


def effective_size(weights: Tensor, mask: Tensor, level: str = "token") -> float:
    """(sum w)^2 / (n sum w^2), Kish: the share of n tokens, or of n rows, that would say as much if all counted alike.

    It waits for the device. 0: no weight is above 0.
    """
    own = weights[mask] if level == "token" else weights[mask.any(1), 0]
    own = own.double()
    squares = float((own * own).sum())
    return float(own.sum()) ** 2 / (own.numel() * squares) if squares > 0 else 0.0
