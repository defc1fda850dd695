"""The side of `generate()` of transformers: what speculation refuses before it begins, and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

Tensor = torch.Tensor


def check_request(model: Any, config: Any, model_kwargs: Mapping[str, Any], synced_gpus: bool) -> None:
    """Raise a ValueError that names what is asked for and cannot be had.

    Args:
        model: of transformers.
        config: its `GenerationConfig` for this call.
        model_kwargs: arguments of the model's calls.
        synced_gpus: as of `generate()`.
    """
    asked = {
        "beams (num_beams > 1)": (config.num_beams or 1) > 1,
        "use_cache=False": not model_kwargs.get("use_cache", True),
        "an encoder-decoder": getattr(model.config, "is_encoder_decoder", False),
        "output_attentions": config.output_attentions,
        "output_hidden_states": config.output_hidden_states,
        "synced_gpus": synced_gpus,
        "token_type_ids": model_kwargs.get("token_type_ids") is not None,
        "guidance_scale, whose processor keeps a cache of its own": (getattr(config, "guidance_scale", None) or 1) != 1,
        "watermarking_config, whose processor counts its calls": getattr(config, "watermarking_config", None) is not None,
    }
    wrong = [what for what, is_asked in asked.items() if is_asked]
    if wrong:
        raise ValueError(f"speculation does not go with {' and '.join(wrong)}; call generate() without custom_generate")


def check_cache(cache: Any) -> None:
    """Raise a ValueError unless drafted tokens can be taken back from the cache of a prefill."""
    from transformers import DynamicCache

    if type(cache) is not DynamicCache or not getattr(cache, "is_croppable", True):
        layers = ", ".join(sorted({type(layer).__name__ for layer in cache.layers}))
        raise ValueError(f"speculation needs a DynamicCache that can be cropped, got a {type(cache).__name__} of {layers}")


def result_of(config: Any, ids: Tensor, scores: list[tuple[Tensor, Tensor]], name: str, cache: Any) -> Any:
    """What `generate()` returns.

    Args:
        config: says whether it is tokens alone.
        ids: int64 `[B, length]`.
        scores: scores and logits `[B, V]` of each new token, where they are asked for.
        name: of the cache's field.
        cache: after all tokens but the last.
    """
    if not config.return_dict_in_generate:
        return ids
    from transformers.generation import GenerateDecoderOnlyOutput

    shown: dict[str, Any] = {"sequences": ids, name: cache}
    if config.output_scores:
        shown["scores"] = tuple(s for s, _ in scores)
    if config.output_logits:
        shown["logits"] = tuple(x for _, x in scores)
    return GenerateDecoderOnlyOutput(**shown)
