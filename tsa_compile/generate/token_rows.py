"""The tokens of a batch, in numbers that may differ between its rows, and the scores that logits processors make of a model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Tensor = torch.Tensor
#: Processors of transformers that do not look at the tokens before: one call does for all places.
BLIND = frozenset(
    {
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TopHLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "LogitNormalization",
        "InfNanRemoveLogitsProcessor",
        "SuppressTokensLogitsProcessor",
    }
)


class TokenRows:
    """Prompts of one length (padded at the left, where they differ), and the new tokens behind them.

    Args:
        prompt: int64 `[B, L]`.
        room: new tokens that there is room for.
        pad: what stands behind a row that ends before others.

    Attributes:
        ids: int64 `[B, L + room]`; behind a row's length: tokens that are only proposed, or `pad`.
        lengths: tokens of each row.
        ends: int64 `[B, 1]`, the same, where the tokens are.
        done: has the row ended?
        over: bool `[B]`, the same, where the tokens are.
    """

    def __init__(self, prompt: Tensor, room: int, pad: int) -> None:
        batch, self.prompt = prompt.shape
        self.ids = torch.cat([prompt, prompt.new_full((batch, room), pad)], 1)
        self.pad = pad
        self.lengths = [self.prompt] * batch
        self.ends = prompt.new_full((batch, 1), self.prompt)
        self.done = [False] * batch
        self.over = torch.zeros(batch, dtype=torch.bool, device=prompt.device)

    @property
    def batch(self) -> int:
        return len(self.lengths)

    def last(self) -> Tensor:
        """int64 `[B, 1]`: the last token of each row."""
        return self.ids.gather(1, self.ends - 1)

    def propose(self, tokens: Tensor, behind: int = 0) -> None:
        """Put `tokens` `[B, n]` `behind` tokens behind each row's end; they are not counted."""
        places = self.ends + behind + torch.arange(tokens.shape[1], device=self.ids.device)
        self.ids.scatter_(1, places, tokens)

    def append(self, tokens: Tensor, new: Tensor) -> None:
        """The first `new[b]` tokens of row `b` of `tokens` `[B, n]` are its next; what was proposed behind them is taken back.

        Nothing waits for the device: whoever has read `new`, int64 `[B]`, tells `know`.
        """
        counts = new[:, None]
        self.propose(torch.where(torch.arange(tokens.shape[1], device=tokens.device) < counts, tokens, self.pad))
        self.ends = self.ends + counts

    def know(self, new: Sequence[int], over: Sequence[int]) -> None:
        """The host's side of `append` and of `over`."""
        self.lengths = [length + count for length, count in zip(self.lengths, new, strict=True)]
        self.done = [bool(x) for x in over]

    def all(self) -> Tensor:
        """int64 `[B, longest]`, `pad` behind the shorter rows."""
        return self.ids[:, : max(self.lengths)]


def scores_behind(processors: Any, rows: TokenRows, logits: Tensor, behind: int = 0) -> Tensor:
    """What `processors` make of logits, as in plain generation.

    Args:
        processors: a `LogitsProcessorList`.
        rows: the tokens; proposed ones stand in place.
        logits: float32 `[B, n, V]`: of the token that follows `behind` proposed tokens, `behind + 1`, ...
        behind: as said.

    Returns:
        `[B, n, V]`.
    """
    batch, n, vocabulary = logits.shape
    if not processors:
        return logits
    if all(type(p).__name__ in BLIND for p in processors):
        flat: Tensor = processors(rows.ids[:, :1].repeat_interleave(n, 0), logits.reshape(batch * n, vocabulary).clone())
        return flat.view(batch, n, -1)
    return torch.stack([_scores(processors, rows, logits[:, i], behind + i) for i in range(n)], 1)


def _scores(processors: Any, rows: TokenRows, logits: Tensor, behind: int) -> Tensor:
    """`[B, V]`. All rows are in each call, as processors may know them by their number; those of that length take its result."""
    result: Tensor | None = None
    for length in sorted(set(rows.lengths)):
        scores: Tensor = processors(rows.ids[:, : length + behind], logits.clone())
        result = scores if result is None else torch.where(rows.ends == length, scores, result)
    assert result is not None
    return result
