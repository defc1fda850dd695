"""Sliding-window layers of a dense model in blocks: the same sums as the full mask gives, in O(L * window) instead of O(L^2).

transformers runs such layers under PyTorch's attention with an `L x L` mask, which at 32K tokens takes 97 % of a prefill of
Gemma 3. These layers stay dense in every variant; only their cost changes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

Tensor = torch.Tensor
NAME = "tsa_local"


def use_local_attention(model: Any) -> None:
    """Let `model` (transformers) run its prefills' sliding-window layers in blocks; other layers stay with SDPA."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    window = kwargs.get("sliding_window")
    if window is None or query.shape[2] <= window or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    out = local_attention(query, key, value, window, kwargs["scaling"])
    return out.transpose(1, 2).contiguous(), None


@torch.library.custom_op("tsa_evaluate::local_attention", mutates_args=())
def local_attention(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """Causal attention over the last `window` keys, the own one included. An operator, so that no pass looks inside.

    Args:
        q: [B, H, L, D]; k, v: [B, Hk, L, D], with L > window. No padding.

    Returns:
        [B, H, L, D].
    """
    batch, heads, length, dim = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))  # SDPA's kernels with a mask take equal head counts
    head = slice(0, window)
    first = F.scaled_dot_product_attention(q[:, :, head], k[:, :, head], v[:, :, head], is_causal=True, scale=scale)
    blocks = (length + window - 1) // window
    fill = (0, 0, 0, blocks * window - length)
    q, k, v = (F.pad(x, fill).view(batch, heads, blocks, window, dim) for x in (q, k, v))
    k, v = (torch.cat((x[:, :, :-1], x[:, :, 1:]), 3) for x in (k, v))  # each block behind the one before it
    row = torch.arange(window, device=q.device)[:, None]
    column = torch.arange(2 * window, device=q.device)[None, :]
    band = (column > row) & (column <= row + window)
    q, k, v = (x.flatten(0, 1) for x in (q[:, :, 1:], k, v))
    rest = F.scaled_dot_product_attention(q, k, v, attn_mask=band, scale=scale)
    return torch.cat((first, rest.view(batch, heads, -1, dim)), 2)[:, :, :length].contiguous()


@local_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    return q.new_empty(q.shape)
