"""Attention of a transformers model by a plan's policies: what one takes is replaced, the rest stays, with the reason told."""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any

import torch

from tsa_compile.interface.dense import dense_attention, matters
from tsa_compile.interface.mask import shaped_mask
from tsa_compile.kernels.types import KvView, Operands
from tsa_compile.passes.site import AttentionSite, MaskFacts
from tsa_compile.plan import Plan
from tsa_compile.policies.base import Policy, call
from tsa_compile.policies.why_dense import where_it_pays
from tsa_compile.rules import layer_number

log = logging.getLogger("tsa_compile")
Tensor = torch.Tensor


class Front:
    """Who answers for the attention of one implementation.

    Args:
        plan: read by the path of the module that asks.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def path(self, module: torch.nn.Module) -> str | None:
        """Of an attention module in its model, here by its `layer_idx` alone; None: it is no module of the front's."""
        return f"layers.{getattr(module, 'layer_idx', None) or 0}.self_attn"

    def tell(self, module: torch.nn.Module, q: Tensor, k: Tensor, policy: Policy | None, reason: str | None) -> None:
        """What became of one call: computed by the policy, or dense for the reason."""
        if reason is not None:
            _log_once(type(module).__name__, reason)


def register_front(front: Front, name: str) -> None:
    """Make `attn_implementation=name` known to transformers (5.17 or later); `front` answers for it.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, functools.partial(_attention, front))
    AttentionMaskInterface.register(name, shaped_mask)


def _attention(
    front: Front,
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
        out = _sparse(front, module, query, key, value, attention_mask, scale, causal)
        if out is not None:
            return out.transpose(1, 2).contiguous(), None
    else:
        front.tell(module, query, key, None, reason)
    return dense_attention(module, query, key, value, attention_mask, dropout, scaling, is_causal, options)


def _dense_reason(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool, options: dict[str, Any]
) -> str | None:
    """Why this call is not for any policy; None: it may be."""
    if q.shape[2] == 1:
        return "decode step: one query"
    special = [n for n, x in options.items() if matters(n, x)]
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


@torch.compiler.disable
def _sparse(
    front: Front, module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, causal: bool
) -> Tensor | None:
    """The result by the policy of the module's layer; None: it refuses, and the front was told why."""
    path = front.path(module)
    if path is None:
        front.tell(module, q, k, None, "a copy of a transformed model is dense")
        return None
    if not q.dtype == k.dtype == v.dtype:
        front.tell(module, q, k, None, f"mixed dtypes {q.dtype}, {k.dtype}, {v.dtype}")
        return None
    mask = MaskFacts(causal, padded=key_mask is not None)
    site = AttentionSite.of(Operands(q, k, v, key_mask), mask, scale, module=path, layer=layer_number(path) or 0)
    policy = front.plan.policy_for(site)
    site, reason = where_it_pays(policy, site, front.plan.pays_from(policy, site))
    front.tell(module, q, k, policy, reason)
    if reason is not None:
        return None
    if key_mask is not None:
        view = KvView.ordered(*torch.ops.tsa.key_view(key_mask))
        site = dataclasses.replace(site, operands=site.operands._replace(view=view))
    out: Tensor = policy.attend(call, site, policy.select(call, site, None))
    return out


@functools.cache
def _log_once(module: str, reason: str) -> None:
    log.info("attn_implementation tsa: %s stays dense: %s", module, reason)
