"""What an index is trained on: the attention of one query head at some rows, and how far the projected softmax is from it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tsa_compile.learn.top_p import top_p

Tensor = torch.Tensor


class Teacher(NamedTuple):
    """One query head's attention at some rows of a text.

    Args:
        shares: float32 `[rows, L]`, the softmax over the keys that a row sees, cut to its fewest entries that hold the mass, and
            normalised again.
        hidden: bool `[rows, L]`, keys behind the row.
    """

    shares: Tensor
    hidden: Tensor


def teacher_of(q: Tensor, k: Tensor, rows: Tensor, scale: float, mass: float) -> Teacher:
    """Of rotated queries `[rows, D]` at positions `rows` and rotated keys `[L, D]`, without gradients."""
    hidden = torch.arange(k.shape[0], device=k.device) > rows[:, None]
    with torch.no_grad():
        shares = (q.float() @ k.float().mT * scale).masked_fill(hidden, -torch.inf).softmax(-1)
        shares = torch.where(top_p(shares, mass), shares, 0.0)
    return Teacher(shares / shares.sum(-1, keepdim=True), hidden)


def divergence(teacher: Teacher, query: Tensor, key: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Mean over rows of KL(teacher || softmax of the projections), in nats: `q` `[rows, D]` and `k` `[L, D]` before rotation."""
    z = ((q @ query.mT) @ (k @ key.mT).mT).masked_fill(teacher.hidden, -torch.inf)
    student = torch.where(teacher.shares > 0, z.log_softmax(-1), 0.0)
    entropy = torch.special.entr(teacher.shares).sum(-1)
    return -(teacher.shares * student).sum(-1).mean() - entropy.mean()
