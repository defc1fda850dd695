"""The models the finder proves itself on: real code, tiny random configurations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

TINY: dict[str, Any] = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
GQA: dict[str, Any] = dict(num_key_value_heads=2)
LENGTH = 48
NO_FAST_PATH = "no fast path"  # nn.MultiheadAttention and its users without their fused operator
FLEX = "flex_attention"
IMPLEMENTATIONS = ("sdpa", "eager", FLEX)

Inputs = Callable[[], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model family.

    Args:
        name: as its users call it.
        library: the package it comes from.
        build: implementation -> the model, in evaluation mode; for "sdpa" one that calls SDPA. Raises `NotOffered` for an
            implementation that the model has not.
        causal: how many of its attentions have a causal mask (and padding) and nothing else on the scores: these must be
            replaced in every prefill, and no others are.
        inputs: () -> keyword arguments of one call.
        kind: which scenarios it goes through, a key of `scenarios.SCENARIOS`.
        implementations: of attention, by the names of transformers if it has a choice.
    """

    name: str
    library: str
    build: Callable[[str], nn.Module]
    causal: int
    inputs: Inputs
    kind: str = "decoder"
    implementations: tuple[str, ...] = IMPLEMENTATIONS


class NotOffered(Exception):
    """The model has no such attention implementation; the message is its own."""


def ids(length: int = LENGTH, batch: int = 1) -> dict[str, Any]:
    g = torch.Generator().manual_seed(length)
    return {"input_ids": torch.randint(3, 90, (batch, length), generator=g)}


def pixels(size: int = 32) -> dict[str, Any]:
    return {"pixel_values": torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(size))}


def sharpen(model: nn.Module) -> nn.Module:
    """Weights of unit gain: with the usual small ones attention is flat, and any selection is a tie."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2 and "embed" not in name:
                p.copy_(torch.randn(p.shape, generator=g) / p[0].numel() ** 0.5)
    return model.eval()


def hf(config: str, model: str, tiny: bool = True, **overrides: Any) -> Callable[[str], nn.Module]:
    """A random transformers model by the names of its classes."""

    def build(implementation: str) -> nn.Module:
        import transformers

        fields = {**(TINY if tiny else {}), **overrides}
        return from_config(getattr(transformers, model), getattr(transformers, config)(**fields), implementation)

    return build


def from_config(model: Any, config: Any, implementation: str) -> nn.Module:
    """A model of transformers with one of its attention implementations."""
    try:
        return sharpen(model._from_config(config, attn_implementation=implementation))
    except ValueError as error:
        if "does not support" in str(error):
            raise NotOffered(str(error).split(". ")[0]) from None
        raise


def causal(name: str, family: str, *, sites: int = 2, **overrides: Any) -> Entry:
    """A decoder whose classes are `FamilyConfig` and `FamilyForCausalLM`."""
    return Entry(name, "transformers", hf(f"{family}Config", f"{family}ForCausalLM", **overrides), sites, ids)


def other(
    name: str,
    config: str,
    model: str,
    inputs: Inputs = ids,
    *,
    sites: int = 0,
    kind: str = "call",
    tiny: bool = False,
    **overrides: Any,
) -> Entry:
    """A model by the names of its classes."""
    return Entry(name, "transformers", hf(config, model, tiny, **overrides), sites, inputs, kind)
