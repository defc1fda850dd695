"""Which of the tokens that a step settled are new, and which rows end with them: eos, length, stopping criteria."""

from __future__ import annotations

from typing import Any

import torch

from tsa_compile.generate.accept import Accepted, up_to_end
from tsa_compile.generate.token_rows import TokenRows

Tensor = torch.Tensor


class Ends:
    """The stopping criteria of `generate()`: end tokens and the length are told at once, others after each token.

    Args:
        criteria: a `StoppingCriteriaList`.
        max_length: tokens of a row, its prompt included.
    """

    def __init__(self, criteria: Any, max_length: int) -> None:
        tokens = [c.eos_token_id.flatten() for c in criteria if hasattr(c, "eos_token_id")]
        self.tokens: Tensor | None = torch.cat(tokens) if tokens else None
        self.max_length = max_length
        self._others = [c for c in criteria if not hasattr(c, "eos_token_id") and not hasattr(c, "max_length")]

    def settle(self, rows: TokenRows, accepted: Accepted, together: bool) -> tuple[list[int], list[int]]:
        """Append what is new to `rows`; of each row, how many drafted tokens the rule kept, and how many new ones it got.

        Args:
            rows: those that are done get nothing.
            accepted: of a step.
            together: all rows become longer by as many tokens as every open row has; `pad`s stand behind those that end. What a
                row gets then depends on other rows alone, so the law of its tokens stays the target's.
        """
        until, ended = up_to_end(accepted, None if self.tokens is None else self.tokens.to(accepted.tokens.device))
        kept, new, at_end = torch.stack([accepted.kept, until, ended.long()]).tolist()  # the one read of a step
        for b, length in enumerate(rows.lengths):
            if new[b] > self.max_length - length:
                new[b], at_end[b] = self.max_length - length, 0
        if self._others:
            self._ask_others(rows, accepted.tokens, new, at_end)
        new = [0 if done else n for done, n in zip(rows.done, new, strict=True)]
        counts, tokens = new, accepted.tokens
        if together:
            going_on = [n for n, end, done in zip(new, at_end, rows.done, strict=True) if not (end or done)]
            counts = [min(going_on, default=max(new))] * rows.batch
            own = torch.tensor(new, device=tokens.device)[:, None]
            tokens = torch.where(torch.arange(tokens.shape[1], device=tokens.device) < own, tokens, rows.pad)
        rows.append(tokens, counts)
        for b, count in enumerate(counts):
            rows.done[b] = rows.done[b] or bool(at_end[b] and new[b] <= count) or rows.lengths[b] >= self.max_length
        return kept, [min(n, count) for n, count in zip(new, counts, strict=True)]

    def _ask_others(self, rows: TokenRows, tokens: Tensor, new: list[int], at_end: list[int]) -> None:
        """Cut each row's new tokens behind the first at which some criterion stops it."""
        rows.propose(tokens)
        for length in {n for b, n in enumerate(rows.lengths) if not rows.done[b]}:
            waiting = {b for b, n in enumerate(rows.lengths) if n == length and not rows.done[b]}
            for count in range(1, tokens.shape[1] + 1):
                waiting = {b for b in waiting if new[b] >= count}
                if not waiting:
                    break
                stops = torch.stack([c(rows.ids[:, : length + count], None) for c in self._others]).any(0).tolist()
                for b in [b for b in waiting if stops[b]]:
                    new[b], at_end[b] = count, 1
