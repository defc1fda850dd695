"""The logits of a rollout's steps by one call that has gradients: each new token reads the pages that its decode step would read.

Decode kernels have no backward; here the pages of all steps are chosen at once, without gradients, and become a mask. It costs
what dense attention over the same rows costs, and a boolean of `[B, H, new tokens, tokens]` a layer: for training an adapter, not
for speed. Steps by `PageSparse` (share, number or schedule), `HeadSplit` and `Exact`, behind prompts that are read by `Dense` or
`HeadSplit`, in models of transformers that take its attention interface.
"""

from __future__ import annotations

import contextvars
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from tsa_compile.cache.head_index import HeadIndex
from tsa_compile.cache.learned_index import NAME
from tsa_compile.learn.head_rows import prompt_keys_of_local_heads, step_keys
from tsa_compile.learn.page_rows import causal, keys_of, pages_by_means
from tsa_compile.plan import Plan
from tsa_compile.policies.base import Policy
from tsa_compile.policies.dense import Dense
from tsa_compile.policies.exact import Exact
from tsa_compile.policies.head_split import HeadSplit
from tsa_compile.policies.page_sparse import PageSparse

Tensor = torch.Tensor
_IMPLEMENTATION = "tsa_sparse_rows"


class Steps(NamedTuple):
    """What the attention of the running call needs to know.

    Args:
        there: bool `[B, L]`, tokens that are no padding.
        padded: is there any?
        first: rows from here on are decode steps; those before are a prompt.
        plan: bound to the model.
        paths: of the model's modules, by their identity.
    """

    there: Tensor
    padded: bool
    first: int
    plan: Plan
    paths: dict[int, str]


_steps: contextvars.ContextVar[Steps] = contextvars.ContextVar("tsa_sparse_rows")


def sparse_logits(model: Any, given: Mapping[str, Tensor], first: int, plan: Plan) -> Tensor:
    """Logits `[B, L - first + 1, V]` behind the last token before `first`, and behind each from there on.

    Args:
        model: a decoder of transformers.
        given: its ids, padding mask and positions, `[B, L]` each (`scoring.behind`).
        first: the first token that a decode step has read.
        plan: bound to the model; its policies for prefill and decode.

    Raises:
        ValueError: a policy is none of those above.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(_IMPLEMENTATION, _no_mask)
    before = model.config._attn_implementation
    paths = {id(module): path for path, module in model.named_modules()}
    there = given["attention_mask"].bool()
    token = _steps.set(Steps(there, not bool(there.all()), first, plan, paths))
    model.set_attn_implementation(_IMPLEMENTATION)
    try:
        logits: Tensor = model(**given, use_cache=False, logits_to_keep=given["input_ids"].shape[1] - first + 1).logits
    finally:
        model.set_attn_implementation(before)
        _steps.reset(token)
    return logits


def _attend(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float | None = None, **options: Any
) -> tuple[Tensor, None]:
    """`[B, H, L, D]`, `[B, Hk, L, D]`, `[B, Hk, L, Dv]` -> `[B, L, H, Dv]`."""
    there, padded, first, plan, paths = _steps.get()
    special = [n for n in ("softcap", "s_aux", "sliding_window") if options.get(n) is not None]
    if special:
        raise ValueError(f"{type(module).__name__}: attention with {special[0]} has no sparse rows with gradients")
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    prefill, policy = (plan.policy_at(paths[id(module)], phase, module.layer_idx) for phase in ("prefill", "decode"))
    parts = [_prompt(prefill, q[:, :, :first], k[:, :, :first], v[:, :, :first], there[:, :first], padded, scale)]
    if first < q.shape[2]:
        index = getattr(module, NAME, None)
        seen = keys_read(policy, q, k, there, first, scale, index if isinstance(index, HeadIndex) else None)
        parts.append(_attention(q[:, :, first:], k, v, seen, scale))
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


def _prompt(policy: Policy, q: Tensor, k: Tensor, v: Tensor, there: Tensor, padded: bool, scale: float) -> Tensor:
    """Attention `[B, H, first, Dv]` of a prompt's rows."""
    seen = causal(there, 0, there.shape[1]) if padded else None
    if isinstance(policy, Dense):
        return _attention(q, k, v, seen, scale)
    if not isinstance(policy, HeadSplit):
        raise ValueError(f"prompts before sparse rows with gradients are read by Dense or HeadSplit; got {policy}")
    heads, owners = torch.arange(q.shape[1]), torch.arange(q.shape[1]) // (q.shape[1] // k.shape[1])
    wide = torch.isin(heads, torch.tensor(policy.retrieval, dtype=torch.long))
    masks = ((wide, seen), (~wide, prompt_keys_of_local_heads(policy, there)))
    out = [_attention(q[:, own], k[:, owners[own]], v[:, owners[own]], mask, scale) for own, mask in masks if own.any()]
    return torch.cat(out, 1)[:, torch.cat([heads[wide], heads[~wide]]).argsort()]


def _attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """seen: bool `[B, 1 or Hk or H, n, L]`; None: all before a row."""
    if seen is not None and seen.shape[1] > 1:
        seen = seen.repeat_interleave(q.shape[1] // seen.shape[1], 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None, scale=scale, enable_gqa=True)


def _no_mask(*args: Any, **options: Any) -> None:
    return None


@torch.no_grad()
def keys_read(
    policy: Policy, q: Tensor, k: Tensor, there: Tensor, first: int, scale: float, index: HeadIndex | None = None
) -> Tensor:
    """bool `[B, 1 or Hk or H, L - first, L]`: what the decode steps of these rows read.

    Args:
        q, k: rotated, `[B, H, L, D]` and `[B, Hk, L, D]`. there: bool `[B, L]`.
        index: of the attention, for `HeadSplit(mass=...)`.
    """
    seen = causal(there, first, q.shape[2])
    if isinstance(policy, Exact):
        return seen
    if isinstance(policy, HeadSplit):
        return step_keys(policy, index, q, k, there, first, scale)
    if not isinstance(policy, PageSparse) or policy.mass is not None or not policy.by_means:
        raise ValueError(
            "sparse rows with gradients are those of PageSparse of kind 'mean' by keep, pages or schedule, without completion, "
            f"HeadSplit and Exact; got {policy}"
        )
    keep, table, _ = policy.budget
    pages = pages_by_means(q, k, there, first, scale, keep, table, policy.sinks, policy.recent)
    return seen & keys_of(pages, q.shape[2])
