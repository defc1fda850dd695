"""What a mask is, proven by the function that transformers builds it from, and said in the shape of what is returned.

| mask | means |
|---|---|
| None | no padding; causal if the module is, with `Lq == Lk` |
| bool `[B, K]` | causal, the queries being the last of the first `K` keys; false: padding |
| `[B, 1 or H, Lq, Lk]` | anything else, in full, as SDPA takes it |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

Tensor = torch.Tensor


def shaped_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Tensor | None:
    """What transformers calls for each kind of layer of a model; the table above says what it returns."""
    from transformers import masking_utils

    traced = torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting() or _captured(device)
    mask_function = mask_function or masking_utils.causal_mask_function
    causal = mask_function is masking_utils.causal_mask_function
    if not causal or kv_offset or q_length == 1 or (traced and isinstance(q_offset, Tensor)):
        if q_length > 1:
            options["allow_is_causal_skip"] = False  # None would leave open to which end it is aligned
        return masking_utils.sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            cast(int, q_offset),
            kv_offset,
            mask_function,
            attention_mask,
            device=device,
            **options,
        )
    used = int(q_offset) + q_length  # the rest of a static cache is never seen
    if attention_mask is not None:
        padding = masking_utils.prepare_padding_mask(attention_mask, used, 0)[:, :used].to(torch.bool)  # type: ignore[index]
        if traced or not padding.all():
            return padding
    if used == q_length == kv_length:
        return None
    return torch.ones(batch_size, used, dtype=torch.bool, device=device)


def _captured(device: torch.device | str) -> bool:
    """Is a CUDA graph being captured? Then nothing may be read from the device."""
    return torch.device(device).type == "cuda" and torch.cuda.is_current_stream_capturing()
