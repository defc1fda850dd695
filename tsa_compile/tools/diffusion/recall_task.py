"""A recall task for block diffusion: facts lie in a long prefix, and the last block asks for several of them at once.

A fact is one token that says a key and its value. The last block begins with questions, a key each; behind them stand [MASK]s
for the values, in the same order. One step can settle one answer; those of further steps need the facts again, so that a wrong
list of remembered keys brings them down to chance.
"""

from __future__ import annotations

import dataclasses

import torch

from tsa_compile.tools.diffusion.model import Sizes

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class RecallTask:
    """Token ids: facts (key * values + value), questions, answers, then `fillers` others, then [MASK].

    Args:
        keys, values: how many there are; each key has one fact in the prefix.
        questions: of a block, which has as many answers.
        prefix: tokens before the block, a multiple of the block's.
        fillers: ids of what is no fact.
    """

    keys: int
    values: int
    questions: int
    prefix: int
    fillers: int = 1

    def __post_init__(self) -> None:
        if self.prefix % self.block or self.prefix < self.keys:
            raise ValueError(f"prefix must be whole blocks of {self.block} and hold {self.keys} facts, got {self.prefix}")
        if not 1 <= self.questions <= self.keys:
            raise ValueError(f"questions must be from 1 to the {self.keys} keys, got {self.questions}")

    @property
    def block(self) -> int:
        return 2 * self.questions

    @property
    def vocabulary(self) -> int:
        return self.first_filler + self.fillers + 1

    @property
    def first_filler(self) -> int:
        return self.keys * self.values + self.keys + self.values

    def sizes(self, **other: int) -> Sizes:
        """Of a model for it."""
        return Sizes(self.vocabulary, self.block, **other)

    def sample(self, batch: int, generator: torch.Generator, text: Tensor | None = None) -> Tensor:
        """Token ids `[batch, prefix + block]`, on the CPU.

        Args:
            text: numbers of fillers, 1-D, of which runs fill the prefix; None: at random.
        """
        draw = lambda high, *size: torch.randint(high, size, generator=generator)  # noqa: E731
        values, keys = draw(self.values, batch, self.keys), torch.arange(self.keys)
        if text is None:
            prefix = draw(self.fillers, batch, self.prefix)
        else:
            prefix = text[draw(len(text) - self.prefix, batch, 1) + torch.arange(self.prefix)]
        places = torch.rand(batch, self.prefix, generator=generator).argsort(1)[:, : self.keys]
        prefix = (prefix + self.first_filler).scatter(1, places, keys * self.values + values)
        asked = torch.rand(batch, self.keys, generator=generator).argsort(1)[:, : self.questions]
        first = self.keys * self.values
        return torch.cat([prefix, first + asked, first + self.keys + values.gather(1, asked)], 1)

    def noise(self, batch: int, generator: torch.Generator) -> Tensor:
        """Which tokens of the last block are [MASK] in training: all answers in half of the rows, some in the others."""
        rate = torch.where(torch.rand(batch, 1, generator=generator) < 0.5, 1.0, torch.rand(batch, 1, generator=generator))
        noise = torch.rand(batch, self.block, generator=generator) < rate
        noise[:, : self.questions] = False
        noise[:, self.questions] |= ~noise.any(1)
        return noise
