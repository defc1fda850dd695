"""transformers' `generate()` makes the 4-D masks of calls over a static cache: of a prompt, that is left to the model.

Made in the model's forward, as over any other cache, a mask is proven from the padding `[B, L]` that it comes from; as an
argument it would be data, and the prompt dense.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

_NAME = "create_masks_for_generate"  # what generate() looks up on the model, and has a function for


class PromptMasks:
    """Stands for the function on one model. A mask of decode steps is made as ever: transformers compiles these itself."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def __call__(self, *, inputs_embeds: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
        if inputs_embeds.shape[1] > 1 and (attention_mask is None or attention_mask.dim() == 2):
            return attention_mask
        make = self._own
        if make is None:
            from transformers.masking_utils import create_masks_for_generate as make
        return make(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)


def leave_to_the_model(model: nn.Module) -> None:
    """From now on. A model without `generate()`, or with a function of the user's own on it, stays as it is."""
    if hasattr(model, "prepare_inputs_for_generation") and _NAME not in vars(model):
        setattr(model, _NAME, PromptMasks(getattr(model, _NAME, None)))


def make_beforehand(model: nn.Module) -> None:
    """As before `leave_to_the_model`."""
    if isinstance(vars(model).get(_NAME), PromptMasks):
        delattr(model, _NAME)
