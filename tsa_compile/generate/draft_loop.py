"""All draft steps of a round as one call, which one CUDA graph can hold: each token is chosen on the device, none is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch

from tsa_compile.generate.sampling import sample

Tensor = torch.Tensor
#: Processors of transformers that neither look at the tokens before, nor at the device from the host, nor hold tensors.
ON_DEVICE = frozenset(
    {
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "LogitNormalization",
        "InfNanRemoveLogitsProcessor",
    }
)
_NUMBERS = (bool, int, float, str, type(None))


class Drafted(NamedTuple):
    """Args:
    tokens: int64 `[B, n]`.
    chances: float32 `[B, n, V]`, the distributions that they were sampled from; None: they were not.
    """

    tokens: Tensor
    chances: Tensor | None


@dataclasses.dataclass(frozen=True)
class DraftLoop:
    """`steps` steps of the model, one token each.

    Args:
        steps: how many.
        processors: a `LogitsProcessorList`, of which `why_not` has nothing to say.
        sampled: or the best token.
    """

    steps: int
    processors: Any
    sampled: bool

    @property
    def key(self) -> Hashable:
        """Loops of one key do the same."""
        rules = tuple((type(p).__name__, *sorted(vars(p).items())) for p in self.processors or ())
        return self.steps, self.sampled, rules

    def __call__(self, call: Callable[..., Any], advance: Callable[[], None], **kwargs: Any) -> Drafted:
        """Only operations of the device.

        Args:
            call: the model.
            advance: moves the cache's place by one row, between two calls.
            kwargs: of each call, but for input_ids: int64 `[B, 1]`, the last token of each row; and position_ids, if there are:
                int64 `[..., B, steps]`, of all calls.
        """
        token, position_ids = kwargs.pop("input_ids"), kwargs.pop("position_ids", None)
        tokens, chances = list[Tensor](), list[Tensor]()
        for i in range(self.steps):
            if i:
                advance()
            if position_ids is not None:  # with the strides of a step's own, which its graph is guarded by
                kwargs["position_ids"] = position_ids[..., i : i + 1].clone(memory_format=torch.contiguous_format)
            scores = call(input_ids=token, **kwargs).logits[:, -1].float()
            if self.processors:
                scores = self.processors(token, scores)
            if self.sampled:
                chances.append(scores.softmax(-1))
            token = sample(chances[-1]) if self.sampled else scores.argmax(-1, keepdim=True)
            tokens.append(token)
        return Drafted(torch.cat(tokens, 1), torch.stack(chances, 1) if chances else None)


def why_not(processors: Any) -> str | None:
    """Why draft steps with these logits processors cannot be one call; None: they can."""
    names = {type(p).__name__ for p in processors or () if not _is_on_device(p)}
    return f"logits processors look at the tokens before, or at the device: {', '.join(sorted(names))}" if names else None


def _is_on_device(processor: Any) -> bool:
    return type(processor).__name__ in ON_DEVICE and all(isinstance(x, _NUMBERS) for x in vars(processor).values())
