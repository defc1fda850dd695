"""`tsa::materialize`: a copy that no compiler computes again, so that what many read is computed once."""

from __future__ import annotations

import torch


def copied(x: torch.Tensor) -> torch.Tensor:
    """`x`, contiguous, in memory of its own."""
    return x.clone(memory_format=torch.contiguous_format)
