"""The eager reference: the same model, uncompiled, whose `scaled_dot_product_attention` runs the policy on the tensors at hand.

Nothing here reads a graph. What a mask says is found by comparing its numbers with those of a causal mask with padding, so
this says independently what a replaced site has to compute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tsa_compile.kernels.attend.tokens.definition import sparse_attention_oracle
from tsa_compile.kernels.common.ranks import view_of_mask
from tsa_compile.kernels.compose_reference import select_tokens_reference
from tsa_compile.kernels.types import Operands, TokenRule
from tsa_compile.passes.site import AttentionSite, MaskFacts
from tsa_compile.policies.base import Policy, call
from tsa_compile.policies.token_sparse import TokenSparse
from tsa_compile.policies.why_dense import why_dense
from tsa_compile.tools.zoo.entries import Entry
from tsa_compile.tools.zoo.result import CheckFailed
from tsa_compile.tools.zoo.scenarios import Scenario

HIDDEN_BELOW = -1e4


class SdpaReference:
    """`with SdpaReference(...)`: calls of SDPA that `takes` chooses run the policy.

    Args:
        policy: what they run.
        takes: (number of the call, is its mask causal with padding and are there two queries or more) -> is it chosen?
    """

    def __init__(self, policy: Policy, takes: Callable[[int, bool], bool]) -> None:
        self.policy, self.takes = policy, takes
        self.calls = self.taken = 0
        self._dense = F.scaled_dot_product_attention

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        chosen = self.takes(self.calls, query.shape[2] > 1 and _is_causal(query, key, *args, **kwargs))
        self.calls += 1
        self.taken += chosen
        out = attention_reference(self.policy, query, key, value, *args, **kwargs) if chosen else None
        return self._dense(query, key, value, *args, **kwargs) if out is None else out

    def __enter__(self) -> SdpaReference:
        F.scaled_dot_product_attention = self
        return self

    def __exit__(self, *exception: object) -> None:
        F.scaled_dot_product_attention = self._dense


def _is_causal(
    query: Tensor, key: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False, **kwargs: Any
) -> bool:
    try:
        causal_with_padding(_visible(query, key, attn_mask, is_causal))
    except ValueError:
        return False
    return True


def attention_reference(
    policy: Policy,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Attention by a policy, with SDPA's arguments; `[B, H, Lq, Dv]`, or None where the policy leaves it dense."""
    used, key_mask = causal_with_padding(_visible(query, key, attn_mask, is_causal))
    x = Operands(query, key[:, :, :used], value[:, :, :used], key_mask, view_of_mask(key_mask))
    site = AttentionSite.of(x, MaskFacts(causal=True, padded=key_mask is not None), scale)
    if why_dense(policy, site) is not None:
        return None
    if isinstance(policy, TokenSparse):
        return _token_sparse(policy, x, site.scale)
    out: Tensor = policy.attend(call, site, policy.select(call, site, None))
    return out


def _token_sparse(policy: TokenSparse, x: Operands, scale: float) -> Tensor:
    """By its definition, row by row: not the operators' own references."""
    c = policy.completion
    rule = TokenRule(policy.coverage, policy.window, policy.pool, policy.min_tokens, c.heavy if c else 0)
    kept = select_tokens_reference(x, scale, rule)
    strip = (c.window, c.sinks) if c else (0, 0)
    return sparse_attention_oracle(x.q, x.k, x.v, *kept, x.key_mask, scale, *strip, policy.min_tokens + policy.window)


def reference_outputs(policy: Policy, model: nn.Module, entry: Entry, scenario: Scenario, taken: list[bool]) -> list[Tensor]:
    """The scenario, uncompiled, with the policy where a site was taken.

    Args:
        policy: what those sites run.
        model: of this entry; it calls SDPA.
        entry, scenario: what is run.
        taken: of each site traced, in order, whether the policy takes it.

    Raises:
        CheckFailed: other calls of SDPA are causal than those that were taken.
    """
    with SdpaReference(policy, lambda call, causal: False) as dense:
        scenario.run(model, entry)
    in_order = dense.calls == len(taken)  # else a graph served several calls; their masks then say which
    with SdpaReference(policy, lambda call, causal: taken[call] if in_order else causal) as reference:
        outputs = scenario.run(model, entry)
    if reference.taken != sum(taken):
        raise CheckFailed(f"{sum(taken)} sites replaced, but {reference.taken} of {reference.calls} calls of SDPA are causal")
    return outputs


def _visible(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """[B, Lq, Lk]: does query i see key j?"""
    shape = (query.shape[0], query.shape[2], key.shape[2])
    seen = torch.ones(shape, dtype=torch.bool, device=query.device)
    if is_causal:
        seen = seen.tril()
    if mask is None:
        return seen
    mask = mask if mask.dtype == torch.bool else mask > HIDDEN_BELOW
    mask = mask.expand(query.shape[0], query.shape[1], *shape[1:])
    if not bool((mask == mask[:, :1]).all()):
        raise ValueError("the mask differs between heads")
    return seen & mask[:, 0]


def causal_with_padding(visible: Tensor) -> tuple[int, Tensor | None]:
    """(keys in use, [B, keys] bool or None if all are real) of a mask `[B, Lq, Lk]` that is causal with padding.

    Queries that are padding themselves may see anything.

    Raises:
        ValueError: it is not.
    """
    _, q_len, k_len = visible.shape
    real = visible.any(1)
    for used in range(q_len, k_len + 1):
        causal = torch.ones(q_len, used, dtype=torch.bool, device=visible.device).tril(used - q_len)
        rows = real[:, used - q_len : used, None].expand(-1, -1, used)
        as_causal = visible[..., :used] == (causal & real[:, None, :used])
        if not bool(real[:, used:].any()) and bool(as_causal[rows].all()):
            return used, None if bool(real[:, :used].all()) else real[:, :used]
    raise ValueError("a site was replaced whose mask is not causal with padding")
