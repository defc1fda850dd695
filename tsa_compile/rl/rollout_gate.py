"""A gate on live rollouts: where sparse steps leave the dense model's side, the next schedule reads more, in the end everything.

`learn/gate.py` chooses a schedule before training, on texts; here the same statistic (`learn/acceptance.py`) comes from the
rollouts themselves (`generate.rollout.Rollout.accepted`), as weights move on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch

from tsa_compile.learn.acceptance import BIN, tails
from tsa_compile.learn.gate import THRESHOLD, Schedule, schedule_plan
from tsa_compile.plan import Plan
from tsa_compile.policies.dense import Dense
from tsa_compile.policies.exact import Exact
from tsa_compile.policies.schedules import DENSE_LAYERS, SCHEDULES

Tensor = torch.Tensor
log = logging.getLogger("tsa_compile")


class RolloutGate:
    """Holds the plan for the next rollout.

    Args:
        schedules: names or tuples, the one to begin with first, each tighter than the one before. One name of a published
            schedule: that one, and then the others of the same model that were fitted to higher thresholds. After the last one
            comes exact decode.
        threshold: of the 5th percentile, in (0, 1]. Published: 0.86; 0.80 degrades, 0.75 collapses.
        dense_layers: first layers that read every key.
        least: tokens without which a bin does not count.

    Attributes:
        plan: what the next rollout is to decode by.
        by_bin: the 5th percentile of each bin that counted in the last rollout.
        said: what the gate did, a line each time.

    Raises:
        ValueError: a number is out of range, or a schedule is none.
    """

    def __init__(
        self,
        schedules: Schedule | Iterable[Schedule],
        threshold: float = THRESHOLD,
        *,
        dense_layers: int = DENSE_LAYERS,
        least: int = 100,
    ) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], got {threshold!r}")
        if type(least) is not int or least < 1:
            raise ValueError(f"least must be an int of at least 1, got {least!r}")
        names = tighter(schedules) if isinstance(schedules, str) else tuple(schedules)
        if not names:
            raise ValueError("schedules must name at least one")
        self._plans = [(str(s), schedule_plan(s, dense_layers)) for s in names]  # type: ignore[arg-type]
        self._plans.append(("exact decode", Plan(prefill=Dense(), decode=Exact())))
        self._threshold, self._least, self._at = threshold, least, 0
        self.by_bin: dict[int, float] = {}
        self.said: list[str] = []

    @property
    def plan(self) -> Plan:
        return self._plans[self._at][1]

    @property
    def name(self) -> str:
        """Of the plan: a schedule, or "exact decode"."""
        return self._plans[self._at][0]

    def saw(self, accepted: Tensor, positions: Tensor, mask: Tensor) -> bool:
        """A rollout's acceptance `[N, T]`, at these positions, where `mask`; is the plan another one now?"""
        at, common = positions[mask].cpu(), accepted[mask].cpu()
        enough = torch.bincount(at // BIN)[at // BIN] >= self._least
        self.by_bin = tails(common[enough].tolist(), at[enough].tolist())
        low = {n: x for n, x in self.by_bin.items() if x < self._threshold}
        if not low or self._at == len(self._plans) - 1:
            return False
        n = min(low, key=lambda key: low[key])
        before = self.name
        self._at += 1
        where = f"positions {n * BIN} to {(n + 1) * BIN - 1}"
        self.said.append(f"{where}: 5th percentile of acceptance {low[n]:.3f} < {self._threshold}: {before} -> {self.name}")
        log.warning("rollouts: %s", self.said[-1])
        return True


def tighter(name: str) -> tuple[str, ...]:
    """A published schedule, and those of the same model that were fitted to higher thresholds, in their order.

    Raises:
        ValueError: there is no such schedule.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedules must be one of {sorted(SCHEDULES)}, or a list, got {name!r}")
    model = name.rpartition("-")[0]
    return tuple(sorted(other for other in SCHEDULES if other.rpartition("-")[0] == model and other >= name))
