"""The accept rule of speculative decoding: which drafted tokens are kept, and which token follows them.

Greedy: a drafted token is kept while it is the one that the target would have chosen. Sampling: it is kept with probability
`min(1, p(x) / q(x))`, and in place of the first that is not comes a sample of `max(p - q, 0)`, normalised; if all are kept,
one of the target's next distribution. The tokens then have the target's distribution exactly, whatever `q` is. Leviathan et al.,
arXiv 2211.17192, algorithm 1; Chen et al., arXiv 2302.01318. Pure functions, no randomness of their own but in `accept_sampled`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tsa_compile.generate.sampling import sample

Tensor = torch.Tensor


class Accepted(NamedTuple):
    """What a verify step has settled.

    Args:
        kept: int64 `[B]`, drafted tokens that are kept, from the first on.
        tokens: int64 `[B, n + 1]`: `kept` drafted tokens and the target's own behind them are new; the rest means nothing.
    """

    kept: Tensor
    tokens: Tensor


def accept_greedy(drafted: Tensor, scores: Tensor) -> Accepted:
    """Keep what the target would have chosen.

    Args:
        drafted: int64 `[B, n]`.
        scores: `[B, n + 1, V]`, the target's logits after their processors, at each drafted token's place and behind the last.
    """
    own = scores.argmax(-1)
    return Accepted(leading(drafted == own[:, :-1]), own)


def accept_sampled(drafted: Tensor, draft: Tensor | None, target: Tensor) -> Accepted:
    """Keep by rejection; draws from torch's generator.

    Args:
        drafted: int64 `[B, n]`.
        draft: `[B, n, V]`, the distributions that they were sampled from; None: each was certain, as of a lookup.
        target: `[B, n + 1, V]`, the target's distributions.
    """
    chances = keep_chances(drafted, draft, target)
    kept = leading(torch.rand_like(chances) < chances)
    own = sample(correction(kept, drafted, draft, target))
    tokens = torch.cat([drafted, own], 1).scatter(1, kept[:, None], own)
    return Accepted(kept, tokens)


def keep_chances(drafted: Tensor, draft: Tensor | None, target: Tensor) -> Tensor:
    """`[B, n]`: how likely each drafted token is to be kept, if all before it are."""
    p = target[:, :-1].gather(2, drafted[..., None])[..., 0]
    if draft is None:
        return p
    q = draft.gather(2, drafted[..., None])[..., 0]
    return torch.where(q > 0, p / q, 0.0).clamp(max=1.0)


def correction(kept: Tensor, drafted: Tensor, draft: Tensor | None, target: Tensor) -> Tensor:
    """`[B, V]`: the distribution of the token behind `kept` `[B]` drafted ones, the next of which, if any, was rejected."""
    n = drafted.shape[1]
    p = _at(target, kept)
    if n == 0:
        return p
    last = kept.clamp(max=n - 1)
    q = torch.zeros_like(p).scatter(1, _at(drafted[..., None], last), 1.0) if draft is None else _at(draft, last)
    rest = (p - q).clamp_min(0.0)
    total = rest.sum(-1, keepdim=True)
    rest = torch.where(total > 0, rest / total, p)  # p = q: nothing is ever rejected, but by rounding
    return torch.where((kept == n)[:, None], p, rest)


def leading(keep: Tensor) -> Tensor:
    """bool `[B, n]` -> int64 `[B]`: how many are true before the first that is not."""
    return keep.long().cumprod(1).sum(1)


def up_to_end(accepted: Accepted, ends: Tensor | None) -> tuple[Tensor, Tensor]:
    """How many tokens of each row are new, and whether the last of them ends it: int64 `[B]`, bool `[B]`.

    Args:
        ends: int64 `[E]`, tokens that end a row; what was kept behind one is dropped. None: there are none.
    """
    new = accepted.kept + 1
    if ends is None:
        return new, torch.zeros_like(new, dtype=torch.bool)
    before = leading(~torch.isin(accepted.tokens, ends))
    return torch.minimum(new, before + 1), before < new


def _at(x: Tensor, n: Tensor) -> Tensor:
    """Row `n[b]` of `x[b]`: `[B, N, V]` -> `[B, V]`."""
    return x.gather(1, n[:, None, None].expand(-1, 1, x.shape[2]))[:, 0]
