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


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model family.

    Args:
        name: as its users call it.
        library: the package it comes from.
        build: () -> the model, in evaluation mode.
        inputs: () -> keyword arguments of one prefill.
        kind: "decoder" (also prefilled with a cache, in chunks, padded), or "other" (one call).
    """

    name: str
    library: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    kind: str = "decoder"


def ids(length: int = LENGTH, batch: int = 1) -> dict[str, Any]:
    g = torch.Generator().manual_seed(length)
    return {"input_ids": torch.randint(3, 90, (batch, length), generator=g)}


def pixels(size: int = 32) -> dict[str, Any]:
    return {"pixel_values": torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(size))}


def hf(config: str, model: str, tiny: bool = True, **overrides: Any) -> Callable[[], nn.Module]:
    """A random transformers model by the names of its classes."""

    def build() -> nn.Module:
        import transformers

        fields = {**(TINY if tiny else {}), **overrides}
        torch.manual_seed(0)
        return getattr(transformers, model)(getattr(transformers, config)(**fields)).eval()  # type: ignore[no-any-return]

    return build


def causal(name: str, family: str, **overrides: Any) -> Entry:
    """A decoder whose classes are `FamilyConfig` and `FamilyForCausalLM`."""
    return Entry(name, "transformers", hf(f"{family}Config", f"{family}ForCausalLM", **overrides), ids)


def other(name: str, config: str, model: str, inputs: Callable[[], dict[str, Any]] = ids, **overrides: Any) -> Entry:
    return Entry(name, "transformers", hf(config, model, **overrides), inputs, "other")
