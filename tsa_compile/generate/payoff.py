"""Whether speculation pays: what a round costs, by a table of the machine's, against the tokens that it gives, as it runs."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

LOSS = 0.02  # of a request's exact steps, that rounds may lose before they are given up: never below .98 of exact decoding


@dataclasses.dataclass(frozen=True)
class Cost:
    """One line of a cost table: seconds of a step over those of an exact decode step, at this batch and length.

    Args:
        batch: rows of the batch.
        length: tokens of the context.
        draft: a draft step's.
        verify: a verify step's, of gamma + 1 rows.
        given: tokens of a row in a round, as measured there on texts like the request's; None: as the request shows.

    Raises:
        ValueError: a number is not positive, or a lookup's draft step, which costs nothing here, is below 0.
    """

    batch: int
    length: int
    draft: float
    verify: float
    given: float | None = None

    def __post_init__(self) -> None:
        given = 1.0 if self.given is None else self.given
        if not (self.batch >= 1 and self.length >= 1 and self.draft >= 0 and self.verify > 0 and given > 0):
            raise ValueError(f"Cost: batch and length of at least 1, draft >= 0, verify and given > 0; got {self}")


class Payoff:
    """Switches speculation off where a round of it is slower than as many exact steps.

    A round costs `gamma * draft + verify` exact steps. The table's nearest line counts (batch first, both by their ratio).
    Speculation does not begin where the line says that it does not pay. It ends for the request once rounds have lost more
    than `LOSS` of its steps, or the last `rounds` of them gave less than they cost.

    Args:
        costs: the table; empty: speculation is never switched off.
        gamma: tokens of a draft.
        tokens: that the request may get, for each row.
        rounds: that are looked back at.
    """

    def __init__(self, costs: Iterable[Cost], gamma: int, tokens: int, rounds: int = 16) -> None:
        self.costs, self.gamma, self.tokens = tuple(costs), gamma, tokens
        self._given: deque[float] = deque(maxlen=rounds)
        self._needed, self._lost = 0.0, 0.0

    def saw(self, tokens: Sequence[int]) -> None:
        """A round gave these tokens to the rows that took part."""
        self._given.append(sum(tokens) / max(1, len(tokens)))
        self._lost += self._needed - self._given[-1]

    def why_off(self, batch: int, length: int) -> str | None:
        """Why speculation does not pay; None: it does, or it is too early to say."""
        if not self.costs:
            return None
        cost = min(self.costs, key=lambda line: distance(line, batch, length))
        needed = self._needed = self.gamma * cost.draft + cost.verify
        if needed >= self.gamma + 1:
            return f"a round costs {needed:.2f} exact steps and gives at most {self.gamma + 1} tokens, by {cost}"
        if cost.given is not None and cost.given < needed:
            return f"a round costs {needed:.2f} exact steps and gave {cost.given:.2f} tokens when it was measured, by {cost}"
        if self._lost > LOSS * self.tokens:
            lost = f"{self._lost:.1f} exact steps, more than {LOSS:.0%} of the {self.tokens} that the request may take"
            return f"rounds, of {needed:.2f} exact steps, have lost {lost}, by {cost}"
        given = sum(self._given) / max(1, len(self._given))
        if len(self._given) == self._given.maxlen and given < needed:
            return f"a round gives {given:.2f} tokens and costs {needed:.2f} exact steps, by {cost}"
        return None


def distance(line: Any, batch: int, length: int) -> tuple[float, float]:
    """How far what was measured at `line.batch` and `line.length` is from a request: by the batch, then by the length."""
    return abs(math.log(line.batch / batch)), abs(math.log(line.length / length))


def as_costs(costs: Any) -> tuple[Cost, ...]:
    """The table from what users pass: None, or lines, each a `Cost` or (batch, length, draft, verify, maybe given)."""
    return tuple(line if isinstance(line, Cost) else Cost(*line) for line in costs or ())
