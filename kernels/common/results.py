"""What every attention returns, uninitialised."""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def empty_result(q: Tensor, v: Tensor) -> Tensor:
    """`[B, H, Lq, Dv]`, stored as `[B, Lq, H, Dv]`."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


def no_lse(q: Tensor) -> Tensor:
    """What stands for a log-sum-exp that nobody needs: `[0]`."""
    return q.new_empty(0, dtype=torch.float32)


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the scores that decode attention leaves for queries of `dtype`: float16 of half precision, else float32."""
    return torch.float16 if dtype.itemsize == 2 else torch.float32
