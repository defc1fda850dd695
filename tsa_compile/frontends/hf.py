"""Hugging Face attention implementation `"tsa"`, for those who do not want to trace: the same policies and operators.

`register()`, then `from_pretrained(..., attn_implementation="tsa")`. The mask function proves what a mask is by the function that
transformers builds it from, and says so in the shape of what it returns; the attention function replaces what a policy takes and
hands the rest to the model's own attention, with the reason logged once.

| mask | means |
|---|---|
| None | no padding; causal if the module is, with `Lq == Lk` |
| bool `[B, K]` | causal, the queries being the last of the first `K` keys; false: padding |
| `[B, 1 or H, Lq, Lk]` | anything else, in full, as SDPA takes it |
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch

from tsa_compile.kernels.types import KvView, Operands
from tsa_compile.passes.site import AttentionSite, MaskFacts
from tsa_compile.plan import Plan, as_plan, without_session
from tsa_compile.policies.base import Policy, call, why_dense

log = logging.getLogger("tsa_compile")
Tensor = torch.Tensor
# What models hand to every attention function and no attention of theirs computes with.
_HARMLESS = {"position_ids", "cache_position", "logits_to_keep", "num_items_in_batch", "position_embeddings", "layer_idx"}
_HARMLESS |= {"past_key_values", "labels", "pixel_values", "token_type_ids", "input_ids", "inputs_embeds"}
_SDPA_KNOWS = frozenset({"sliding_window", "position_bias", "cache"})  # by the mask; natively


def register(policy_or_plan: Policy | Plan | Mapping[str, Any] | None = None, name: str = "tsa") -> None:
    """Make `attn_implementation=name` known to transformers (5.17 or later).

    Args:
        policy_or_plan: as in `transform`; a plan is read by the modules' `layer_idx`.
        name: the implementation's name; several with different policies may be registered.

    Raises:
        ImportError: transformers is not installed.
        TypeError: `policy_or_plan` is none of the above.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, functools.partial(_attention, without_session(as_plan(policy_or_plan))))
    AttentionMaskInterface.register(name, _mask)


def _mask(
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


def _attention(
    plan: Plan,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """`[B, H, Lq, D]`, `[B, Hk, Lk, D]`, `[B, Hk, Lk, Dv]` -> (`[B, Lq, H, Dv]`, None)."""
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = attention_mask is not None or bool(is_causal)
    reason = _dense_reason(query, key, value, attention_mask, dropout, causal, options)
    if reason is None:
        if attention_mask is not None:
            key, value = (x[:, :, : attention_mask.shape[1]] for x in (key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        out, reason = _sparse(plan, getattr(module, "layer_idx", None) or 0, query, key, value, attention_mask, scale, causal)
        if out is not None:
            return out.transpose(1, 2).contiguous(), None
    _log_once(type(module).__name__, reason)  # type: ignore[arg-type]
    return _dense(module, query, key, value, attention_mask, dropout, scaling, is_causal, options)


def _dense_reason(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool, options: dict[str, Any]
) -> str | None:
    """Why this call is not for any policy; None: it may be."""
    if q.shape[2] == 1:
        return "decode step: one query"
    special = [n for n, x in options.items() if _matters(n, x)]
    if special:
        return f"attention with {special[0]}"
    if mask is not None and (mask.dim() != 2 or mask.dtype != torch.bool):
        return "mask is not proven to be causal with padding"
    if mask is None and causal and q.shape[2] != k.shape[2]:
        return "causal mask without a statement of how fewer queries than keys are aligned"
    if dropout:
        return f"dropout={dropout}: dropout in training"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return "inputs require gradients: run under torch.no_grad() or torch.inference_mode()"
    if type(q) is not Tensor or type(k) is not Tensor:
        return f"query is a {type(q).__name__}, key a {type(k).__name__}: tensor subclasses are left alone"
    return None


def _matters(name: str, value: Any) -> bool:
    """May an option change what attention computes? Flags do not, nor does what models hand to everyone."""
    return value is not None and not isinstance(value, bool) and name not in _HARMLESS


@torch.compiler.disable
def _sparse(
    plan: Plan, layer: int, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor | None, str | None]:
    """(the result, None), or (None, why the layer's policy refuses)."""
    if not q.dtype == k.dtype == v.dtype:
        return None, f"mixed dtypes {q.dtype}, {k.dtype}, {v.dtype}"
    mask = MaskFacts(causal, padded=key_mask is not None)
    path = f"layers.{layer}.self_attn"
    site = AttentionSite.of(Operands(q, k, v, key_mask), mask, scale, module=path, layer=layer)
    policy = plan.policy_for(site)
    reason = why_dense(policy, site)
    if reason is not None:
        return None, reason
    if key_mask is not None:
        view = KvView.ordered(*torch.ops.tsa.key_view(key_mask))
        site = dataclasses.replace(site, operands=site.operands._replace(view=view))
    return policy.attend(call, site, policy.select(call, site, None)), None


def _dense(
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
    """The model's own attention: SDPA, or eager where SDPA does not know an option (softcap, sinks)."""
    if mask is not None and mask.dim() == 2:
        k, v = (x[:, :, : mask.shape[1]] for x in (k, v))
        row = torch.arange(q.shape[2], device=q.device)[:, None] + mask.shape[1] - q.shape[2]
        mask = (torch.arange(mask.shape[1], device=q.device) <= row) & mask[:, None, None]
    if all(n in _SDPA_KNOWS for n, x in options.items() if _matters(n, x)):
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


@functools.cache
def _log_once(module: str, reason: str) -> None:
    log.info("attn_implementation tsa: %s stays dense: %s", module, reason)
