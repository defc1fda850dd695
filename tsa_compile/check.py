"""Compare a sparse run with the dense one."""

from __future__ import annotations

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How close sparse predictions are to dense ones, over `predictions` positions."""

    kl: float  # mean KL(dense || sparse), in nats
    top1: float  # share of positions whose most likely token is the same
    max_abs: float  # largest difference of a logit
    predictions: int


def compare_logits(dense: Tensor, sparse: Tensor) -> Comparison:
    """Compare logits `[..., vocabulary]` of the same inputs, in float64.

    Raises:
        ValueError: shapes differ, or a logit is not finite.
    """
    if dense.shape != sparse.shape:
        raise ValueError(f"logits differ in shape: dense {tuple(dense.shape)}, sparse {tuple(sparse.shape)}")
    if not (dense.isfinite().all() and sparse.isfinite().all()):
        raise ValueError("logits are not finite")
    p = dense.double().log_softmax(-1)
    q = sparse.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    same = (p.argmax(-1) == q.argmax(-1)).double()
    return Comparison(kl.mean().item(), same.mean().item(), (dense - sparse).abs().max().item(), kl.numel())
