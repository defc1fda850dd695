"""Samples of a rollout on the device: which one each batch row is at, what was drawn so far, and which rows have ended."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tsa_compile.generate.sampling import sample

Tensor = torch.Tensor


class Drawn(NamedTuple):
    """One token of each of n rows.

    Args:
        tokens: int64 `[n]`.
        logps: float32 `[n]`, log-probabilities of these.
        top: float32 `[n, K]`, those of the K likeliest tokens.
        names: int64 `[n, K]`, which these are.
    """

    tokens: Tensor
    logps: Tensor
    top: Tensor
    names: Tensor


def draw(logits: Tensor, temperature: float, top: int, generator: torch.Generator | None) -> Drawn:
    """Sample from the softmax of `logits / temperature`, float32 `[n, V]`."""
    logps = torch.log_softmax(logits / temperature, -1)
    tokens = sample(logps.exp(), generator)
    return Drawn(tokens[:, 0], logps.gather(1, tokens)[:, 0], *logps.topk(min(top, logps.shape[1])))


class Slots:
    """Every tensor stays on the device, and no step reads one on the host; `ended` is for the caller to read, now and then.

    Args:
        batch: batch rows of the steps.
        samples: sequences that are wanted.
        new_tokens: of each, at most.
        ends: tokens that end one; they are part of it.
        top: likeliest tokens that are kept with each.

    Attributes:
        tokens: int64 `[samples + 1, new_tokens]`; the last row takes what rows without a sample draw.
        logps: float32, the same shape; top: float32 `[..., K]`; names: int32 `[..., K]`.
        lengths: int64 `[samples + 1]`.
        last: int64 `[batch, 1]`, the token that each row is to read next.
        ended: bool `[batch]`: the row's sample is complete.
    """

    def __init__(self, batch: int, samples: int, new_tokens: int, ends: tuple[int, ...], top: int, device: torch.device) -> None:
        shape = (samples + 1, new_tokens)
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self.logps = torch.zeros(shape, device=device)
        self.top = torch.zeros(*shape, top, device=device)
        self.names = torch.zeros(*shape, top, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(samples + 1, dtype=torch.int64, device=device)
        self.last = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.ended = torch.ones(batch, dtype=torch.bool, device=device)
        self._ends = torch.tensor(ends, dtype=torch.int64, device=device)
        self._sample = torch.full((batch,), samples, device=device)  # the row of `tokens` that a batch row is at
        self._spare, self._all = samples, torch.arange(batch, device=device)

    @property
    def drawn(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`tokens`, `logps`, `top`, `names`."""
        return self.tokens, self.logps, self.top, self.names

    def start(self, rows: Tensor, samples: Tensor, drawn: Drawn) -> None:
        """Batch rows `rows` `[n]` are at these samples now, of which these are the first tokens."""
        self._sample[rows], self.ended[rows] = samples, False
        self._write(rows, drawn)

    def take(self, drawn: Drawn) -> None:
        """The next token of every batch row."""
        self._write(self._all, drawn)

    def _write(self, rows: Tensor, drawn: Drawn) -> None:
        where = torch.where(self.ended[rows], self._spare, self._sample[rows])
        at = self.lengths[where].clamp(max=self.tokens.shape[1] - 1)
        self.tokens[where, at], self.logps[where, at] = drawn.tokens, drawn.logps
        self.top[where, at], self.names[where, at] = drawn.top, drawn.names.int()
        self.lengths[where] = at + 1
        self.last[rows, 0] = drawn.tokens
        complete = torch.isin(drawn.tokens, self._ends) | (at + 1 == self.tokens.shape[1])
        self.ended[rows] = self.ended[rows] | complete
