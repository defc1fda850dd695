"""Which earlier tokens can influence a token at all, after all layers: reachability of local attention.

Attention that reads only nearby tokens may never connect two neighbours, however many layers follow each other: with fixed blocks
in every layer nothing crosses a boundary. Only *guaranteed* edges count here (`Edges`); a selection that depends on data may be
empty, so it adds nothing. Source: "Locality Does Not Imply Reachability", arXiv 2606.02680, section 3:

    R_0(t) = {t};   R_l(t) = R_{l-1}(t) + union of R_{l-1}(s) over the edges s -> t of layer l

`Edges` are periodic, so a set of sources depends on the target's phase (its position modulo the period) and is kept as a set of
distances: a Python integer whose bit d says that distance d is reachable.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from tsa_compile.kernels.edges import Edges


@dataclasses.dataclass(frozen=True)
class Reach:
    """Distances that each phase reaches after each layer.

    Args:
        length: distances from 0 to `length - 1` were looked at.
        period: phases, the least common multiple of the layers' periods.
        by_depth: for each number of layers, from 0 on, the distances of each phase as the bits of an integer.
    """

    length: int
    period: int
    by_depth: tuple[tuple[int, ...], ...]

    def connects(self, distance: int, phase: int, depth: int | None = None) -> bool:
        """Whether a token at `phase` can depend on the one `distance` before it, after `depth` layers (None: all)."""
        layers = self.by_depth[-1 if depth is None else depth]
        return bool(layers[phase % self.period] >> distance & 1)

    def hole(self) -> tuple[int, int] | None:
        """(distance, phase): the smallest distance that some phase does not reach, and that phase; None: there is none."""
        first = [_first_zero(distances) for distances in self.by_depth[-1]]
        distance = min(first)
        return None if distance >= self.length else (distance, first.index(distance))

    def first_unreached(self, phase: int, depth: int | None = None) -> int:
        """The smallest distance that `phase` does not reach after `depth` layers (None: all); `length` if it reaches all."""
        return _first_zero(self.by_depth[-1 if depth is None else depth][phase % self.period])

    def pair(self) -> tuple[int, int] | None:
        """(source, target): positions that show the hole; None: there is none."""
        hole = self.hole()
        if hole is None:
            return None
        distance, phase = hole
        target = phase + self.period * max(0, math.ceil((distance - phase) / self.period))
        return target - distance, target

    def depth(self, distance: int) -> int | None:
        """Layers after which every phase reaches every distance up to `distance`; None: all of them are not enough."""
        deep = (n for n, phases in enumerate(self.by_depth) if min(map(_first_zero, phases)) > distance)
        return next(deep, None)

    def share(self, distance: int) -> float:
        """Share of the phases that reach `distance`, in [0, 1]."""
        return sum(distances >> distance & 1 for distances in self.by_depth[-1]) / self.period


def check_reach(layers: Sequence[Edges], length: int) -> Reach:
    """Follow the guaranteed edges of `layers`, the first layer first; exact at any position.

    Cost: period x log2(longest edge) x length bits for each layer.

    Raises:
        ValueError: `length` below 1.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    period = math.lcm(*(edges.period for edges in layers))
    phases = [1] * period
    by_depth = [tuple(phases)]
    for edges in layers:
        phases = _through(edges, phases, length)
        by_depth.append(tuple(phases))
    return Reach(length, period, tuple(by_depth))


def never_connected(layers: Sequence[Edges]) -> tuple[int, int] | None:
    """(phase, period): tokens at this phase never depend on the one before them, however often `layers` are repeated.

    None: every token can depend on every earlier one, given enough layers. For distances add up along a path: distance 1 needs an
    edge of length 1 at its end, and paths over single steps reach the rest.
    """
    found = check_reach([*dict.fromkeys(layers)], 2)
    hole = found.hole()
    return None if hole is None else (hole[1], found.period)


def warning_of(layers: Sequence[Edges]) -> str | None:
    """What is said of layers that never connect some token with the one before it; None: they do, or there are none."""
    hole = never_connected(layers) if layers else None
    if hole is None:
        return None
    where = "no token" if hole[1] == 1 else f"no token at a position {hole[1]} n + {hole[0]}"
    return f"{where} is sure to depend on the one before it, in any number of layers: see tsa_compile.reach"


def depth_needed(layers: Sequence[Edges], length: int) -> int | None:
    """Layers, with `layers` repeated in order, after which every token can depend on every one up to `length - 1` before it.

    None: no number is enough.
    """
    if not layers or (length > 1 and never_connected(layers) is not None):
        return None
    phases = [1] * math.lcm(*(edges.period for edges in layers))
    depth = 0
    while min(map(_first_zero, phases)) < length:
        phases = _through(layers[depth % len(layers)], phases, length)
        depth += 1
    return depth


def _through(edges: Edges, phases: list[int], length: int) -> list[int]:
    """The distances of each phase after one more layer.

    A run of edges [a, c] needs the union of `phases[r - e] << e` for e in the run: two runs of a power of two, which overlap.
    """
    period, limit = len(phases), (1 << length) - 1
    runs = _runs_of_powers(phases, limit, max((min(c, length - 1) - a + 1 for s in edges.spans for a, c in s), default=1))
    reached = []
    for r in range(period):
        distances = phases[r]
        for a, c in edges.spans[r % edges.period]:
            c = min(c, length - 1)
            if a > c:
                continue
            k = (c - a + 1).bit_length() - 1
            for start in (a, c - (1 << k) + 1):
                distances |= runs[k][(r - start) % period] << start
        reached.append(distances & limit)
    return reached


def _runs_of_powers(phases: list[int], limit: int, longest: int) -> list[list[int]]:
    """For each k with 2**k <= `longest` and each phase r: the union of `phases[r - e] << e` for e < 2**k."""
    period, runs = len(phases), [phases]
    while 1 << len(runs) <= longest:
        half = 1 << (len(runs) - 1)
        last = runs[-1]
        runs.append([(last[r] | last[(r - half) % period] << half) & limit for r in range(period)])
    return runs


def _first_zero(bits: int) -> int:
    return (~bits & (bits + 1)).bit_length() - 1
