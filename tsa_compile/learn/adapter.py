"""LoRA weights of PEFT in a model, off until they are asked for: what a sparse policy has and the dense one does not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class Adapter:
    """Its weights lie in the model from now on, and nothing else of the model is trained, until `remove`.

    The model's linear layers `targets` lie inside of PEFT's, under names with "base_layer".

    Args:
        model: a decoder of transformers; not a wrapper of PEFT.
        rank, targets: of the LoRA weights; they count twice (`lora_alpha`).

    Attributes:
        parameters: the adapter's.

    Raises:
        ValueError: the model has adapters already, or none of the targets.
    """

    def __init__(self, model: nn.Module, rank: int, targets: Sequence[str] = ATTENTION) -> None:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise ValueError("the model has adapters already: merge or unload them first")
        self._own = [(p, p.requires_grad) for p in model.parameters()]
        known: Any = model
        self._wrapper: Any = get_peft_model(known, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets)))
        self._wrapper.train(model.training)
        self._layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        own = {id(p) for p, _ in self._own}
        self.parameters = [p for p in model.parameters() if id(p) not in own]
        self._switch(False)

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Inside, the model computes with the adapter."""
        self._switch(True)
        try:
            yield
        finally:
            self._switch(False)

    def thaw(self) -> None:
        """The model's own weights are trained again, as far as they were before."""
        for p, trained in self._own:
            p.requires_grad_(trained)

    def save(self, folder: str | Path) -> None:
        """As `peft.PeftModel.from_pretrained(model, folder)` reads it."""
        self._wrapper.save_pretrained(str(folder))

    def state(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.parameters]

    def load(self, state: Sequence[torch.Tensor]) -> None:
        """What `state` gave of an adapter of the same rank and targets."""
        with torch.no_grad():
            for p, value in zip(self.parameters, state, strict=True):
                p.copy_(value)

    def remove(self) -> None:
        """The model as it was; the adapter's weights are lost."""
        self._wrapper.unload()
        self.thaw()

    def _switch(self, on: bool) -> None:
        for layer in self._layers:
            layer.enable_adapters(on)  # PEFT trains what is on, and only that
