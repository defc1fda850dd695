"""What a resident set is chosen by, and what is counted of it."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple


class ResidentRule(NamedTuple):
    """The numbers of `policies.Resident`, which says what they mean."""

    keep: float
    pages: int
    interval: int
    sinks: int
    recent: int
    layers: tuple[int, ...] | None
    ensemble: str
    strict: bool
    sample: int

    def __str__(self) -> str:
        return f"partly on the device, by {self!r}"


@dataclasses.dataclass
class ResidentCounts:
    """What happened to one cache.

    Args:
        steps: decode steps.
        refreshes: times that the set was chosen.
        pages_fetched: pages that came to the device for the set, of one layer and batch row each.
        to_device: bytes of keys and values from the host, for the set and for steps that read the rest.
        to_host: bytes to the host.
        sampled: attentions in which the lost mass was measured: steps times layers.
        lost: the sum of their lost masses; each a mean over batch rows and heads, in [0, 1].
    """

    steps: int = 0
    refreshes: int = 0
    pages_fetched: int = 0
    to_device: int = 0
    to_host: int = 0
    sampled: int = 0
    lost: float = 0.0

    @property
    def lost_mass(self) -> float:
        """Mean share of the attention that lay outside of the resident set, on sampled steps; NaN: none was."""
        return self.lost / self.sampled if self.sampled else float("nan")
