"""Whether speculation pays: what a round costs, by a table of the machine's, against the tokens that it gives, as it runs."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Cost:
    """One line of a cost table: seconds of a step over those of an exact decode step, at this batch and length.

    Args:
        batch: rows of the batch.
        length: tokens of the context.
        draft: a draft step's.
        verify: a verify step's, of gamma + 1 rows.

    Raises:
        ValueError: a number is not positive, or a lookup's draft step, which costs nothing here, is below 0.
    """

    batch: int
    length: int
    draft: float
    verify: float

    def __post_init__(self) -> None:
        if not (self.batch >= 1 and self.length >= 1 and self.draft >= 0 and self.verify > 0):
            raise ValueError(f"Cost: batch and length of at least 1, draft >= 0, verify > 0; got {self}")


class Payoff:
    """Switches speculation off where a round of it is slower than as many exact steps.

    A round costs `gamma * draft + verify` exact steps and gives as many tokens as rows got in the last `rounds` rounds. The
    table's nearest line counts (batch first, both by their ratio). Once off it stays off for the request.

    Args:
        costs: the table; empty: speculation is never switched off.
        gamma: tokens of a draft.
        rounds: that are looked back at; nothing is decided before.
    """

    def __init__(self, costs: Iterable[Cost], gamma: int, rounds: int = 16) -> None:
        self.costs, self.gamma = tuple(costs), gamma
        self._given: deque[float] = deque(maxlen=rounds)

    def saw(self, tokens: Sequence[int]) -> None:
        """A round gave these tokens to the rows that took part."""
        self._given.append(sum(tokens) / max(1, len(tokens)))

    def why_off(self, batch: int, length: int) -> str | None:
        """Why speculation does not pay; None: it does, or it is too early to say."""
        if not self.costs:
            return None
        cost = min(self.costs, key=lambda c: (abs(math.log(c.batch / batch)), abs(math.log(c.length / length))))
        needed = self.gamma * cost.draft + cost.verify
        if needed >= self.gamma + 1:
            return f"a round costs {needed:.2f} exact steps and gives at most {self.gamma + 1} tokens, by {cost}"
        if len(self._given) < (self._given.maxlen or 0):
            return None
        given = sum(self._given) / len(self._given)
        return f"a round gives {given:.2f} tokens and costs {needed:.2f} exact steps, by {cost}" if given < needed else None


def as_costs(costs: Any) -> tuple[Cost, ...]:
    """The table from what users pass: None, or lines, each a `Cost` or (batch, length, draft, verify)."""
    return tuple(line if isinstance(line, Cost) else Cost(*line) for line in costs or ())
