"""Which query heads look things up in the whole context, and which are local: the roles of `HeadSplit`, by the user's texts.

RTPurbo (arXiv 2605.16928): a span of tokens is repeated at the end of a long text; a head looks things up if the repetition
attends to the first occurrence, `R[h] = mean over t in the repetition of the sum over j in the span of A_h(t, j)`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tsa_compile.learn.attention_watch import last_shares, watched
from tsa_compile.learn.text_decoder import texts_of
from tsa_compile.plan import Plan
from tsa_compile.policies.dense import Dense
from tsa_compile.policies.head_split import HeadSplit
from tsa_compile.progress import progress as progress_bar
from tsa_compile.rules import Rule

Tensor = torch.Tensor


def head_roles(
    model: nn.Module,
    prompts: Iterable[Any],
    share: float = 0.15,
    *,
    threshold: float | None = None,
    per_layer: bool = False,
    span: int = 64,
    policy: HeadSplit | None = None,
    prefill: bool = False,
    progress: bool = True,
) -> Plan:
    """A plan with a rule for each attention: `HeadSplit` with the heads that look things up.

    Args:
        model: a transformers model in evaluation mode with causal attention, which is left as it was.
        prompts: token ids, one unpadded text an entry, longer than two spans, better much longer than `policy.window`.
        share: of all query heads that look things up, in (0, 1], rounded up; published: 0.15.
        threshold: in place of it: heads whose score reaches it do, none being possible.
        per_layer: the share is one of each layer's heads, in place of the whole model's.
        span: tokens that are repeated, from a twentieth of the text on.
        policy: says `keep`, `sinks` and `window`; None: `HeadSplit`'s own.
        prefill: rules for prompts too, as published; otherwise these are read densely.
        progress: show a progress bar on stderr.

    Returns:
        Its `notes` have the score of every head.

    Raises:
        ValueError: an argument is wrong, a text too short, or the model's attention cannot be measured.
    """
    if not 0 < share <= 1 or (threshold is not None and (per_layer or not 0 <= threshold <= 1)):
        raise ValueError(f"share must be in (0, 1], threshold in [0, 1] and without per_layer, got {share!r}, {threshold!r}")
    texts, base = texts_of(model, prompts, 2 * span), HeadSplit(()) if policy is None else policy
    with progress_bar(show=progress) as start:
        advance = start("roles of heads", len(texts))
        found = []
        for ids in texts:
            found.append(lookup_scores(model, ids, span))
            advance()
    scores = {path: torch.stack([scores[path] for scores in found]).mean(0) for path in found[0]}
    chosen = _chosen(scores, share, threshold, per_layer)
    roles = {path: dataclasses.replace(base, retrieval=tuple(heads)) for path, heads in chosen.items()}
    phases = ("prefill", "decode") if prefill else ("decode",)
    rules = tuple(Rule(path, phase, role) for phase in phases for path, role in roles.items())
    notes = {
        "made by": "tsa_compile.learn.head_roles",
        "heads": f"{sum(map(len, chosen.values()))} of {sum(map(len, scores.values()))} look things up",
        "scores": {path: [round(x, 4) for x in values.tolist()] for path, values in scores.items()},
    }
    return Plan(prefill=Dense(), decode=base, rules=rules, notes=notes)


@torch.no_grad()
def lookup_scores(model: nn.Module, ids: Tensor, span: int) -> dict[str, Tensor]:
    """The score of each query head `[H]`, in [0, 1], by attention's path, of a text `[1, L]` whose span is repeated behind it."""
    first, scores = ids.shape[1] // 20, {}

    def look(path: str, q: Tensor, k: Tensor, scale: float) -> None:
        shares = last_shares(q, k, scale, span).flatten(0, 1)
        scores[path] = shares[..., first : first + span].sum(-1).mean(-1).cpu()

    with watched(model, look):
        model(input_ids=torch.cat([ids, ids[:, first : first + span]], 1), use_cache=False)
    return scores


def _chosen(scores: dict[str, Tensor], share: float, threshold: float | None, per_layer: bool) -> dict[str, list[int]]:
    """Heads that look things up, ascending, of each attention. Of equal scores the first ones."""
    if threshold is not None:
        return {path: (values >= threshold).nonzero()[:, 0].tolist() for path, values in scores.items()}
    if per_layer:
        return {path: _best(values, share) for path, values in scores.items()}
    best, begin, chosen = set(_best(torch.cat([*scores.values()]), share)), 0, {}
    for path, values in scores.items():
        chosen[path] = [h for h in range(len(values)) if begin + h in best]
        begin += len(values)
    return chosen


def _best(values: Tensor, share: float) -> list[int]:
    count = math.ceil(share * len(values))
    order: list[int] = values.sort(descending=True, stable=True).indices[:count].tolist()
    return sorted(order)
