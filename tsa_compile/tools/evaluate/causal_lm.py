"""The parts of a causal language model of transformers that evaluations call: its decoder, and logits where they are needed."""

from __future__ import annotations

from typing import Any

import torch

Tensor = torch.Tensor


class CausalLM:
    """A model in evaluation mode.

    Attributes:
        model, decoder: the whole one, and what gives hidden states.
        device: of its parameters.

    Raises:
        TypeError: the model has no `get_decoder` and no output embeddings: not a causal language model of transformers.
    """

    def __init__(self, model: Any) -> None:
        if not hasattr(model, "get_decoder") or model.get_output_embeddings() is None:
            raise TypeError(f"eval takes a causal language model of transformers, got {type(model).__name__}")
        self.model = model
        self.decoder = model.get_decoder()
        self.device = next(model.parameters()).device
        self._head = model.get_output_embeddings()
        self._softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> logits [..., vocabulary]."""
        logits: Tensor = self._head(hidden)
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)

    def wait(self) -> None:
        """Until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
