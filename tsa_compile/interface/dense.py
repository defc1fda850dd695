"""The model's own attention, for what no policy takes: SDPA, or eager where SDPA does not know an option (softcap, sinks)."""

from __future__ import annotations

import sys
from typing import Any

import torch

Tensor = torch.Tensor
SDPA_KNOWS = frozenset({"sliding_window", "position_bias", "cache"})  # by the mask; natively
# What models hand to every attention function and no attention of theirs computes with.
HARMLESS = {"position_ids", "cache_position", "logits_to_keep", "num_items_in_batch", "position_embeddings", "layer_idx"}
HARMLESS |= {"past_key_values", "labels", "pixel_values", "token_type_ids", "input_ids", "inputs_embeds"}


def matters(name: str, value: Any) -> bool:
    """May an option change what attention computes? Flags do not, nor does what models hand to everyone."""
    return value is not None and not isinstance(value, bool) and name not in HARMLESS


def dense_attention(
    module: torch.nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """`[B, H, Lq, D]`, `[B, Hk, Lk, D]`, `[B, Hk, Lk, Dv]` -> (`[B, Lq, H, Dv]`, None). `mask`: as `shaped_mask` gives it."""
    if mask is not None and mask.dim() == 2:
        k, v = (x[:, :, : mask.shape[1]] for x in (k, v))
        row = torch.arange(q.shape[2], device=q.device)[:, None] + mask.shape[1] - q.shape[2]
        mask = (torch.arange(mask.shape[1], device=q.device) <= row) & mask[:, None, None]
    if all(n in SDPA_KNOWS for n, x in options.items() if matters(n, x)):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, q, k, v, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **options)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise NotImplementedError(
            f"{type(module).__name__} has no eager_attention_forward for {sorted(options)}; use sdpa or eager"
        )
    if mask is None and is_causal and q.shape[2] > 1:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()[None, None]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, torch.finfo(q.dtype).min)
    return eager(module, q, k, v, mask, dropout=dropout, scaling=scaling, **options)  # type: ignore[no-any-return]
