"""The logits of a rollout's steps by one call that has gradients: each new token reads the pages that its decode step would read.

Decode kernels have no backward; here the pages of all steps are chosen at once, without gradients, and become a mask. It costs
what dense attention over the same rows costs, and a boolean of `[B, H, new tokens, tokens]` a layer: for training an adapter, not
for speed. `PageSparse` by share, number or schedule, and `Exact`, in models of transformers that take its attention interface.
"""

from __future__ import annotations

import contextvars
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from tsa_compile.kernels.common.pages import PAGE
from tsa_compile.kernels.common.shares import share_bits
from tsa_compile.kernels.select.top_pages.budget import budget
from tsa_compile.plan import Plan
from tsa_compile.policies.base import Policy
from tsa_compile.policies.exact import Exact
from tsa_compile.policies.page_sparse import PageSparse

Tensor = torch.Tensor
_IMPLEMENTATION = "tsa_sparse_rows"


class Steps(NamedTuple):
    """What the attention of the running call needs to know.

    Args:
        there: bool `[B, L]`, tokens that are no padding.
        first: rows from here on are decode steps; those before are a dense prefill.
        plan: bound to the model.
        paths: of the model's modules, by their identity.
    """

    there: Tensor
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
        plan: bound to the model; its policies for decode.

    Raises:
        ValueError: a policy is none of those above.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(_IMPLEMENTATION, _no_mask)
    before = model.config._attn_implementation
    paths = {id(module): path for path, module in model.named_modules()}
    token = _steps.set(Steps(given["attention_mask"].bool(), first, plan, paths))
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
    there, first, plan, paths = _steps.get()
    special = [n for n in ("softcap", "s_aux", "sliding_window") if options.get(n) is not None]
    if special:
        raise ValueError(f"{type(module).__name__}: attention with {special[0]} has no sparse rows with gradients")
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    policy = plan.policy_at(paths[id(module)], "decode", module.layer_idx)
    seen = _causal(there, 0, first)
    parts = [F.scaled_dot_product_attention(q[:, :, :first], k, v, attn_mask=seen, scale=scale, enable_gqa=True)]
    if first < q.shape[2]:
        group = q.shape[1] // k.shape[1]
        seen = keys_read(policy, q, k, there, first, scale).repeat_interleave(group, 1)
        parts.append(F.scaled_dot_product_attention(q[:, :, first:], k, v, attn_mask=seen, scale=scale, enable_gqa=True))
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **options: Any) -> None:
    return None


def _causal(there: Tensor, begin: int, end: int) -> Tensor:
    """bool `[B, 1, end - begin, L]`; a padding row sees itself, or its softmax would be of nothing."""
    row = torch.arange(begin, end, device=there.device)[:, None]
    key = torch.arange(there.shape[1], device=there.device)
    return ((key <= row) & there[:, None, None, :]) | (key == row)


@torch.no_grad()
def keys_read(policy: Policy, q: Tensor, k: Tensor, there: Tensor, first: int, scale: float) -> Tensor:
    """bool `[B, Hk, L - first, L]`: what the decode steps of these rows read. The rules are those of `tsa::page_scores` and
    `tsa::select_pages`, all rows at once.

    Args:
        q, k: `[B, H, L, D]` and `[B, Hk, L, D]`. there: bool `[B, L]`.
    """
    seen = _causal(there, first, q.shape[2])
    if isinstance(policy, Exact):
        return seen.expand(-1, k.shape[1], -1, -1)
    if not isinstance(policy, PageSparse) or policy.mass is not None or not policy.by_means:
        raise ValueError(
            "sparse rows with gradients are those of PageSparse of kind 'mean' by keep, pages or schedule, without completion, "
            f"and Exact; got {policy}"
        )
    pages = _pages_read(policy, q, k, there, first, scale)
    return seen & pages.repeat_interleave(PAGE, -1)[..., : q.shape[2]]


def _pages_read(policy: PageSparse, q: Tensor, k: Tensor, there: Tensor, first: int, scale: float) -> Tensor:
    """bool `[B, Hk, L - first, P]`."""
    length, kv_heads = k.shape[2], k.shape[1]
    short = -length % PAGE
    held = F.pad(there, (0, short)).unflatten(1, (-1, PAGE)).sum(-1)  # [B, P]
    sums = F.pad(k.float() * there[:, None, :, None], (0, 0, 0, short)).unflatten(2, (-1, PAGE)).sum(3)
    page = torch.arange(held.shape[1], device=q.device)
    end = torch.arange(first + 1, length + 1, device=q.device)[:, None]
    real = ((page < end // PAGE) & (held > 0)[:, None])[:, None]  # [B, 1, n, P]
    n = held[:, None, None, None].float()
    rows = q[:, :, first:].float().unflatten(1, (kv_heads, -1))
    logits = scale * (rows @ sums[:, :, None].mT) / n.clamp_min(1) + n.clamp_min(1).log()
    shares = logits.masked_fill(~real[:, :, None], -torch.inf).softmax(-1).nan_to_num(0.0).mean(2)
    is_open = (page == end // PAGE) & (end % PAGE > 0)  # [n, P]
    sink = real & (real.cumsum(-1) <= policy.sinks)
    forced = sink | (real & (page > (end - 1) // PAGE - policy.recent))
    keep, table, _ = policy.budget
    share = torch.tensor([share_bits(keep[g % len(keep)]) for g in range(kv_heads)], device=q.device)[:, None, None]
    opened = is_open.any(-1, keepdim=True).long()
    wanted = budget(real.sum(-1, keepdim=True) + opened, share, table) - opened
    ranked = shares.masked_fill(~real, -torch.inf).masked_fill(forced, torch.inf)
    rank = ranked.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (real & (rank < torch.maximum(wanted, forced.sum(-1, keepdim=True)))) | is_open
