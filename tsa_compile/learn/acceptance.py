"""How close a sparse rollout stays to the dense model in its worst tokens: Sparrow's statistic (arXiv 2606.08446).

A token's acceptance is the share that two distributions over the vocabulary have in common, sum_v min(p(v), q(v)): how often
speculative decoding would take the sparse model's token for the dense one's. Training on sparse rollouts was stable where its 5th
percentile was at least 0.85 to 0.9 in every bin of 2,000 positions; the mean says nothing (0.968 collapsed, 0.977 did not).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

Tensor = torch.Tensor
BIN = 2000  # positions
WORST = 0.05


def acceptance(dense: Tensor, sparse: Tensor) -> Tensor:
    """sum_v min(p(v), q(v)), float32 `[...]`, of logits `[..., V]`."""
    p, q = (torch.softmax(logits.float(), -1) for logits in (dense, sparse))
    return torch.minimum(p, q).sum(-1)


def tails(accepted: Sequence[float], positions: Sequence[int]) -> dict[int, float]:
    """The 5th percentile of each bin that has a token, by the bin's number: position // 2,000."""
    values, bins = torch.tensor(accepted, dtype=torch.float64), torch.tensor(positions) // BIN
    return {int(n): float(values[bins == n].quantile(WORST)) for n in bins.unique()}


def worst(by_bin: Mapping[int, float]) -> float:
    """What counts: the worst bin's."""
    return min(by_bin.values())
