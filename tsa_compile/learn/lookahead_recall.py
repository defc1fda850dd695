"""How much of the attention of the next steps lies in the pages that an index makes resident, beside other ways to choose.

Everything is measured on the dense model's own queries and keys, over all layers and heads, as `Resident` chooses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from tsa_compile.cache.lookahead_index import LookaheadIndex
from tsa_compile.cache.resident_rule import asked_layers
from tsa_compile.kernels.common.pages import PAGE
from tsa_compile.learn.attention_watch import watched
from tsa_compile.learn.lookahead_labels import Windows, draw_rows
from tsa_compile.learn.text_decoder import texts_of
from tsa_compile.policies.resident import Resident
from tsa_compile.progress import progress as progress_bar

Tensor = torch.Tensor
MEANS, BEST, CHANCE = "page means", "the attention itself", "any pages"


@torch.no_grad()
def lookahead_recall(
    model: nn.Module,
    prompts: Iterable[Any],
    kinds: Mapping[str, Mapping[str, LookaheadIndex]],
    policy: Resident,
    rows: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, float]:
    """By name, of the attention that goes to pages that may leave the device the share that goes to those that stay: of each kind
    of index; of page means; of the best pages there are, by what the next steps attend to; and of as many at random.

    Args:
        model: as for `train_lookahead`; it is left as it was.
        prompts: texts, other ones than an index was trained on.
        kinds: indexes by the path of their attention.
        policy: `keep` or `pages` is the budget.
        rows: queries of each text.

    Raises:
        ValueError: the policy has no budget, or a text is too short.
    """
    if policy.keep is None and policy.pages is None:
        raise ValueError("policy: recall is of a budget, keep or pages")
    texts, found = texts_of(model, prompts, policy.interval), dict[str, list[Tensor]]()
    generator = torch.Generator().manual_seed(seed)
    with progress_bar(show=progress) as start:
        advance = start("index: recall", len(texts))
        for ids in texts:
            scores, windows = _scores(model, ids, kinds, policy, rows, generator)
            for name, share in _kept(scores, windows, policy).items():
                found.setdefault(name, []).append(share)
            advance()
    return {name: float(torch.cat(shares).mean()) for name, shares in found.items()}


def _scores(
    model: Any, ids: Tensor, kinds: Mapping[str, Mapping[str, LookaheadIndex]], policy: Resident, number: int,
    generator: torch.Generator,
) -> tuple[dict[str, list[Tensor]], Windows]:  # fmt: skip
    """Each kind's scores of all pages `[rows, P]`, by layer."""
    length = ids.shape[1]
    rows = draw_rows(length, number, policy.interval, policy.sinks, policy.recent, generator).to(ids.device)
    windows = Windows(length, rows, policy.interval, policy.sinks, policy.recent, 0.5)
    numbers = {path: int(module.layer_idx) for path, module in model.named_modules() if hasattr(module, "layer_idx")}
    asked = asked_layers(policy.layers, max(numbers.values()) + 1)
    scores: dict[str, list[Tensor]] = {name: [] for name in (*kinds, MEANS)}

    def look(path: str, q: Tensor, k: Tensor, scale: float) -> None:
        windows.add(q[0], k[0], scale)
        if numbers[path] not in asked:
            return
        means = k[:, :, : length // PAGE * PAGE].float().unflatten(2, (-1, PAGE)).mean(3)
        whole = torch.arange(means.shape[2], device=k.device) < ((rows + 1) // PAGE)[:, None]
        logits = q[:, :, rows].float().unflatten(1, (k.shape[1], -1)) @ means[:, :, None].mT * scale
        scores[MEANS].append(logits.masked_fill(~whole, -torch.inf).softmax(-1).nan_to_num(0.0).mean((0, 1, 2)))
        for name, by_path in kinds.items():
            scores[name].append(by_path[path].logits(q[:, :, rows], rows[None], means)[0].sigmoid())

    with watched(model, look):
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return scores, windows


def _kept(scores: Mapping[str, list[Tensor]], windows: Windows, policy: Resident) -> dict[str, Tensor]:
    """Of each row, the share of its candidates' attention in the best ones by each kind of scores."""
    pages = (windows.rows + 1 + PAGE - 1) // PAGE
    budget = pages * policy.keep if policy.keep is not None else torch.full_like(pages, policy.pages or 0)
    free = (budget.ceil().long() - (pages - windows.candidates.sum(1))).clamp_min(0)
    joined = {name: torch.stack(x).amax(0) if policy.ensemble == "max" else torch.stack(x).mean(0) for name, x in scores.items()}
    joined[BEST] = windows.mass
    total, found = windows.mass.sum(1).clamp_min(1e-30), {}
    for name, score in joined.items():
        order = score.masked_fill(~windows.candidates, -torch.inf).argsort(dim=1, descending=True, stable=True)
        kept = torch.arange(order.shape[1], device=order.device) < free[:, None]
        found[name] = (windows.mass.gather(1, order) * kept).sum(1) / total
    found[CHANCE] = (free / windows.candidates.sum(1)).clamp_max(1)
    return found
