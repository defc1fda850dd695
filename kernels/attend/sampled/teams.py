"""Attention to sampled teams of keys, in plain PyTorch: what the kernels compute. Contract: docs/operators.md, `team_attention`.

SANTA++ (arXiv 2609.35629): a team's mass is guessed from its representative, `phi = log(size) + s`; Gumbel noise is added to it,
and of a query head the `draws` largest are read whole, each weighed by one over its chance to be read. Numerator and denominator
of the attention are right on average, as in priority sampling (Duffield, Lund and Thorup, 2007); their ratio is near.
"""

from __future__ import annotations

import torch

from tsa_compile.kernels.attend.sampled import draw
from tsa_compile.kernels.common.pages import PAGE, page_view, pages_of
from tsa_compile.kernels.common.teams import SLOTS, unpack
from tsa_compile.kernels.common.view import key_range, rows_in_order
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor


def team_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    teams: Tensor,
    blocks: Tensor | None,
    block: int,
    start: Tensor | None,
    lengths: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    seed: Tensor,
    draws: int,
    recent: int,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`tsa::team_attention` on any device. Teams are chosen by float32 logits; sums are those of the inputs' dtype."""
    view, kv_heads = KvView(blocks, block, start, lengths), k.shape[1]
    wide = (x if x.dtype == torch.float64 else x.float() for x in (q, k, v))  # of half inputs the scores would be half, too
    logits = torch.ops.tsa.decode_attention(*wide, blocks, block, start, lengths, key_mask, scale, scores=True)[2][:, :, 0]
    pages = pages_of(logits.shape[2])
    bits = rows_in_order(teams[..., None], page_view(view))[:, :, :pages, 0]
    bits = torch.nn.functional.pad(bits, (0, pages - bits.shape[2])).repeat_interleave(q.shape[1] // kv_heads, 1)
    bias = key_biases(logits, bits, *key_range(k, view), seed, draws, recent)
    read = (bias > -torch.inf).unflatten(1, (kv_heads, -1)).any(2)[..., None]  # no other row of V is
    v = torch.where(read, rows_in_order(v, view), 0)
    cache = (q, rows_in_order(k, view), v, None, 1, start, lengths, key_mask, scale)
    out, lse, _ = torch.ops.tsa.decode_attention(*cache, bias[:, :, None], sinks)
    return out, lse


def key_biases(logits: Tensor, bits: Tensor, first: Tensor, end: Tensor, seed: Tensor, draws: int, recent: int) -> Tensor:
    """What is added to each logit: `-log(chance)` of a key whose team is read, -inf of others, 0 of keys that are always read.

    Args:
        logits: float32 `[B, H, capacity]`, natural, -inf where hidden.
        bits: int64 `[B, H, pages]`, teams of whole pages; of others anything.
        first, end: int `[B]`, the range of each row's keys.
    """
    heads, capacity = logits.shape[1:]
    pages = bits.shape[2]
    team, representative, number = unpack(bits)
    padded = torch.nn.functional.pad(logits, (0, pages * PAGE - capacity), value=-torch.inf).unflatten(2, (pages, PAGE))
    page = torch.arange(pages, device=logits.device)
    drawn = page <= ((end - 1) // PAGE - recent)[:, None, None]  # pages before the recent ones
    members = (team[..., None] == torch.arange(SLOTS, device=logits.device)) & _visible(first, end, padded)[..., None]
    phi = padded.gather(3, representative) + torch.log(members.sum(3).float())
    there = drawn[..., None] & (torch.arange(SLOTS, device=logits.device) < number[..., None]) & phi.isfinite()
    phi = phi.masked_fill(~there, -torch.inf).flatten(2)
    noise = gumbel(draw.random_words(seed, end - 1, heads, torch.arange(pages * SLOTS, device=logits.device)))
    biases = team_biases(phi, noise, draws).unflatten(2, (pages, SLOTS)).gather(3, team)
    biases = torch.where(drawn[..., None], biases, 0.0).masked_fill(padded == -torch.inf, -torch.inf)
    return biases.flatten(2)[..., :capacity]


def _visible(first: Tensor, end: Tensor, padded: Tensor) -> Tensor:
    """bool `[B, H, pages, 16]`: keys between a row's first and last that no mask hides, by their logits."""
    j = torch.arange(padded.shape[2] * PAGE, device=padded.device)
    inside = (j >= first[:, None]) & (j < end[:, None])
    return inside.view(len(first), 1, *padded.shape[2:]) & (padded > -torch.inf)


def team_biases(phi: Tensor, noise: Tensor, draws: int) -> Tensor:
    """`-log(chance)` of teams that are read, -inf of others: float32 `[..., n]`.

    The `draws` largest of `phi + noise` are read; `tau` is the next largest, -inf if there is none. A team's chance, whatever the
    noise of the others, is `1 - exp(-exp(phi - tau))`.

    Args:
        phi: `[..., n]`, log masses; -inf: no team.
        noise: `[..., n]`, of the Gumbel distribution.
    """
    y = phi + noise
    more = min(draws + 1, y.shape[-1])
    tau = y.topk(more, -1).values[..., -1:] if draws < y.shape[-1] else torch.full_like(y[..., :1], -torch.inf)
    chance = -torch.expm1(-torch.exp(phi - tau.masked_fill(tau == -torch.inf, -1e30)))
    return torch.where((y > tau) & (phi > -torch.inf), -torch.log(chance), -torch.inf)


def gumbel(word: Tensor) -> Tensor:
    """Gumbel noise, float32, of words in [0, 2**32): `-log(-log(1 - u))`, `u = (word + 1/2) / 2**32`."""
    u = ((word.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-u))
