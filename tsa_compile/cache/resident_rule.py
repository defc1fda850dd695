"""What a resident set is chosen by, and what is counted of it."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from tsa_compile.cache.lookahead_index import LookaheadIndex


class ResidentRule(NamedTuple):
    """The numbers of `policies.Resident`, which says what they mean.

    Args:
        threshold: 0.0: none.
        indexes: learned ones, by the number of their layer; none: pages are scored by their mean keys.
    """

    keep: float
    pages: int
    interval: int
    sinks: int
    recent: int
    layers: tuple[int, ...] | None
    ensemble: str
    strict: bool
    sample: int
    threshold: float = 0.0
    indexes: tuple[tuple[int, LookaheadIndex], ...] = ()

    def __str__(self) -> str:
        by = f", and learned indexes of layers {[n for n, _ in self.indexes]}" if self.indexes else ""
        return f"partly on the device, by {self._replace(indexes=())!r}{by}"

    @property
    def is_bounded(self) -> bool:
        """Is there a budget? Otherwise the threshold alone says what is resident."""
        return self.keep > 0 or self.pages > 0

    def asked(self, layers: int) -> tuple[int, ...]:
        """Of so many layers of a cache those whose queries choose, ascending.

        Raises:
            ValueError: it has no such layer.
        """
        return asked_layers(tuple(n for n, _ in self.indexes) or self.layers, layers)


def asked_layers(named: tuple[int, ...] | None, layers: int) -> tuple[int, ...]:
    """Of so many layers those that are named; None: those at a quarter, half and three quarters of the depth.

    Raises:
        ValueError: there is no such layer.
    """
    if named is None:
        return tuple(sorted({layers // 4, layers // 2, 3 * layers // 4}))
    if max(named) >= layers:
        raise ValueError(f"Resident.layers: {named}, but the cache has {layers} layers")
    return tuple(sorted(named))


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
