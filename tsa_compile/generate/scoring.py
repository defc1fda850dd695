"""What the model itself says of tokens that another policy drew: one exact pass, and how much the two have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

Tensor = torch.Tensor
AT_ONCE = 1024  # tokens whose float32 distributions exist at a time


class Scored(NamedTuple):
    """Of N sequences, 0 behind the end of each.

    Args:
        logps: float32 `[N, T]`, the model's log-probabilities of the tokens.
        accepted: float32 `[N, T]`, see `common_mass`.
    """

    logps: Tensor
    accepted: Tensor


def common_mass(dense: Tensor, sparse: Tensor) -> Tensor:
    """sum_v min(p(v), q(v)) over some tokens, and all others as if they were one: float32 `[...]`, 1 where p is q.

    Sparrow (arXiv 2606.08446) takes the 20 likeliest tokens. With all tokens it is `learn.acceptance.acceptance`; with fewer it
    is that or more, by at most what the others hold.

    Args:
        dense, sparse: log-probabilities `[..., K]` of the same K tokens under both policies.
    """
    p, q = dense.exp(), sparse.exp()
    others = torch.minimum(1 - p.sum(-1), 1 - q.sum(-1)).clamp_min(0.0)
    return torch.minimum(p, q).sum(-1) + others


@torch.no_grad()
def score(
    model: Any,
    prompts: Sequence[Tensor],
    tokens: Tensor,
    lengths: Tensor,
    top: Tensor,
    names: Tensor,
    *,
    temperature: float = 1.0,
    rows: int = 4,
) -> Scored:
    """One pass of `model(...)` over prompts and tokens.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        prompts: N tensors, int64 `[L]`.
        tokens: int64 `[N, T]`. lengths: int64 `[N]`, at least 1.
        top, names: log-probabilities and numbers `[N, T, K]` of the tokens that were likeliest where each was drawn.
        temperature: that they were drawn with.
        rows: sequences of one call.
    """
    logps, accepted = torch.zeros(tokens.shape, device=tokens.device), torch.zeros(tokens.shape, device=tokens.device)
    for begin in range(0, len(prompts), rows):
        part = slice(begin, begin + rows)
        longest = int(lengths[part].max())
        drawn = tokens[part, :longest]
        there = torch.arange(longest, device=tokens.device) < lengths[part, None]
        ids, mask = left_padded(prompts[part], tokens.device)
        given = behind(ids, mask, drawn, there)
        logits = model(**given, use_cache=False, logits_to_keep=longest + 1).logits[:, :-1]
        for at in range(0, longest, AT_ONCE):
            now = slice(at, min(at + AT_ONCE, longest))
            p = torch.log_softmax(logits[:, now].float() / temperature, -1)
            common = common_mass(p.gather(2, names[part, now].long()), top[part, now])
            logps[part, now] = p.gather(2, drawn[:, now, None])[..., 0] * there[:, now]
            accepted[part, now] = common * there[:, now]
    return Scored(logps, accepted)


def left_padded(prompts: Sequence[Tensor], device: torch.device, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Token ids and mask, int64 `[n, length]`; None: as long as the longest."""
    length = max(map(len, prompts)) if length is None else length
    ids = torch.zeros(len(prompts), length, dtype=torch.int64, device=device)
    mask = torch.zeros_like(ids)
    for n, prompt in enumerate(prompts):
        ids[n, length - len(prompt) :] = prompt
        mask[n, length - len(prompt) :] = 1
    return ids, mask


def positions_of(mask: Tensor) -> Tensor:
    """int64 `[n, L]`: the first token that is no padding is at 0."""
    return (mask.cumsum(1) - 1).clamp_min(0)


def behind(ids: Tensor, mask: Tensor, drawn: Tensor, there: Tensor) -> dict[str, Tensor]:
    """A call's arguments: `drawn` `[n, T]`, where `there` `[n, T]`, behind prompts."""
    mask = torch.cat([mask, there.long()], 1)
    return {"input_ids": torch.cat([ids, drawn], 1), "attention_mask": mask, "position_ids": positions_of(mask)}
