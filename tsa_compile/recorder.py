"""Watch what the selections of a run keep."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from tsa_compile.kernels import ops


class KeptTokens:
    """Kept tokens of every selection, in order of execution; counts stay on the device until they are read."""

    def __init__(self) -> None:
        self._counts: list[tuple[torch.Tensor, int]] = []

    def _observe(self, counts: torch.Tensor, k_len: int) -> None:
        self._counts.append((counts, k_len))

    def shares(self) -> list[float]:
        """Kept share of the keys of each selection, in [0, 1], averaged over the batch. Waits for the device."""
        return [c.float().mean().item() / k_len if k_len else 0.0 for c, k_len in self._counts]


@contextlib.contextmanager
def record_kept() -> Iterator[KeptTokens]:
    """`with record_kept() as kept: model(ids)`, then `kept.shares()`. Selections of other threads and
    replays of CUDA graphs are not seen."""
    kept = KeptTokens()
    with ops.observing(kept._observe):
        yield kept
