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

        The device is read once, for all of it; criteria of the caller's own read it besides.

        Args:
            rows: those that are done get nothing.
            accepted: of a step.
            together: all rows become longer by as many tokens as every open row has; `pad`s stand behind those that end. What a
                row gets then depends on other rows alone, so the law of its tokens stays the target's.
        """
        tokens = accepted.tokens
        if self.tokens is not None:
            self.tokens = self.tokens.to(tokens.device)
        new, ended = up_to_end(accepted, self.tokens)
        left = self.max_length - rows.ends[:, 0]
        new, ended = torch.minimum(new, left), ended & (new <= left)
        if self._others:
            new, ended = self._ask_others(rows, tokens, new, ended)
        new = new.masked_fill(rows.over, 0)
        counts = new
        if together:
            counts = fewest(new, ended | rows.over)
            own = torch.arange(tokens.shape[1], device=tokens.device) < new[:, None]
            tokens = torch.where(own, tokens, rows.pad)
        rows.append(tokens, counts)
        rows.over = rows.over | (ended & (new <= counts)) | (rows.ends[:, 0] >= self.max_length)
        told = torch.stack([accepted.kept, torch.minimum(new, counts), counts, rows.over.long()])
        kept, got, appended, over = told.tolist()  # the one read of a round
        rows.know(appended, over)
        return kept, got

    def _ask_others(self, rows: TokenRows, tokens: Tensor, new: Tensor, ended: Tensor) -> tuple[Tensor, Tensor]:
        """`new` and `ended`, cut behind the first token at which some criterion stops a row."""
        rows.propose(tokens)
        counts, stopped = new.tolist(), ended.tolist()
        for length in {n for b, n in enumerate(rows.lengths) if not rows.done[b]}:
            waiting = {b for b, n in enumerate(rows.lengths) if n == length and not rows.done[b]}
            for count in range(1, tokens.shape[1] + 1):
                waiting = {b for b in waiting if counts[b] >= count}
                if not waiting:
                    break
                stops = torch.stack([c(rows.ids[:, : length + count], None) for c in self._others]).any(0).tolist()
                for b in [b for b in waiting if stops[b]]:
                    counts[b], stopped[b] = count, True
        return torch.tensor(counts, device=new.device), torch.tensor(stopped, device=new.device)


def fewest(new: Tensor, closed: Tensor) -> Tensor:
    """int64 `[B]`: for every row the least of `new` `[B]` among rows that are not `closed`; if all are, the most."""
    none = torch.iinfo(torch.int64).max
    least = new.masked_fill(closed, none).min()
    return torch.where(least == none, new.max(), least).expand_as(new)
