"""Which schedule of pages keeps a rollout close enough to the dense model, measured on the user's prompts.

Sparrow's gate (arXiv 2606.08446): the cheapest schedule whose acceptance statistic reaches the threshold in its worst bin. The
end of each text is decoded token by token, with the sparse steps' own keys and values; the dense model reads it at once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tsa_compile.kernels.common.pages import pages_of
from tsa_compile.kernels.select.top_pages.budget import budget
from tsa_compile.learn.acceptance import acceptance, tails, worst
from tsa_compile.learn.model_inputs import fingerprint
from tsa_compile.learn.state import Measured
from tsa_compile.learn.text_decoder import TextDecoder, texts_of
from tsa_compile.plan import Plan
from tsa_compile.policies.dense import Dense
from tsa_compile.policies.exact import Exact
from tsa_compile.policies.page_sparse import PageSparse
from tsa_compile.policies.schedules import DENSE_LAYERS, RECENT, SCHEDULES, SINKS
from tsa_compile.progress import Advance
from tsa_compile.progress import progress as progress_bar
from tsa_compile.rules import Rule

Tensor = torch.Tensor
Schedule = str | tuple[int, ...]
THRESHOLD = 0.86


def schedule_plan(schedule: Schedule, dense_layers: int = DENSE_LAYERS) -> Plan:
    """Sparrow's decode: a dense prefill; steps read pages by the schedule, and 1 first and 2 last ones; first layers read all."""
    rules = tuple(Rule(layer, "decode", Exact()) for layer in range(dense_layers))
    return Plan(prefill=Dense(), decode=PageSparse(schedule=schedule, sinks=SINKS, recent=RECENT), rules=rules)


def choose_schedule(
    model: nn.Module,
    prompts: Iterable[Any],
    threshold: float = THRESHOLD,
    *,
    schedules: Iterable[Schedule] | None = None,
    last: int = 512,
    dense_layers: int = DENSE_LAYERS,
    state: str | Path | None = None,
    progress: bool = True,
) -> Plan:
    """The plan of the cheapest schedule that stays at or above `threshold` in every bin of 2,000 positions that was measured.

    Args:
        model: a transformers model in evaluation mode, which is left as it was.
        prompts: token ids, one unpadded text an entry, longer than `last`: prompts with answers of the model, as long as in use.
            Only positions among the last ones of some text are measured.
        threshold: of the 5th percentile of sum min(p, q), in (0, 1]. Published: 0.86; 0.80 degrades, 0.75 collapses.
        schedules: names or tuples; None: all published ones.
        last: tokens at the end of each text that are decoded one by one.
        dense_layers: first layers that read every key.
        state: a JSON file; what is measured goes there, and an interrupted call goes on from it, with the same result.
        progress: show a progress bar on stderr.

    Returns:
        Its `notes` have, for each schedule that was tried, the statistic by bin and the share of the pages that was read.

    Raises:
        ValueError: an argument is wrong, no attention takes the policy, or no schedule reaches the threshold.
    """
    candidates = _candidates(SCHEDULES if schedules is None else schedules)
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be in (0, 1], got {threshold!r}")
    texts = texts_of(model, prompts, last)
    fits = fingerprint(model, [{"input_ids": ids} for ids in texts])
    measured = Measured(state, {"prompts and model": fits, "last": last, "dense layers": dense_layers})
    decoder = TextDecoder(model, schedule_plan(next(iter(candidates.values())), dense_layers), last)
    positions = [p for ids in texts for p in range(ids.shape[1] - last, ids.shape[1])]
    order = sorted(candidates, key=lambda name: pages_read(candidates[name], positions))
    tried: dict[str, Any] = {}
    with progress_bar(show=progress) as start:
        advance = start("schedules", len(order) * len(texts))
        for name in order:
            plan = schedule_plan(candidates[name], dense_layers)
            accepted = _accepted(name, plan, texts, decoder, measured, advance)
            by_bin = tails(accepted, positions)
            tried[name] = {
                "5th percentile by bin": {str(n): x for n, x in by_bin.items()},
                "pages read": pages_read(candidates[name], positions),
            }
            if worst(by_bin) >= threshold:
                notes = {"made by": "tsa_compile.learn.gate", "threshold": threshold, "chosen": name, "tried": tried}
                return dataclasses.replace(plan, notes=notes)
    best = max(tried, key=lambda name: worst(tried[name]["5th percentile by bin"]))
    found = worst(tried[best]["5th percentile by bin"])
    raise ValueError(f"no schedule reaches {threshold} in its worst bin; the nearest is {best} with {found:.4f}")


def pages_read(schedule: Schedule, positions: Sequence[int]) -> float:
    """The mean share of the pages that a step at one of the positions reads, in layers that are not dense."""
    entries = [n + SINKS + RECENT for n in PageSparse(schedule=schedule).entries]
    shares = [min(1.0, budget(pages_of(p + 1), 0, entries) / pages_of(p + 1)) for p in positions]
    return sum(shares) / len(shares)


def _candidates(schedules: Iterable[Schedule]) -> dict[str, Schedule]:
    """Schedules by name; one without a name is called by its entries."""
    named: dict[str, Schedule] = {s if isinstance(s, str) else " ".join(map(str, s)): s for s in schedules}
    for schedule in named.values():
        PageSparse(schedule=schedule)  # an error names what is wrong with it
    if not named:
        raise ValueError("schedules must name at least one")
    return named


def _accepted(
    name: str, plan: Plan, texts: Sequence[Tensor], decoder: TextDecoder, measured: Measured, advance: Advance
) -> list[float]:
    """Acceptance of each measured token, text after text."""
    accepted: list[float] = []
    for n, ids in enumerate(texts):
        accepted += measured.get(f"{name}, text {n}", functools.partial(decoder.compared, ids, plan, acceptance))
        advance(f"{name}: text {n + 1} of {len(texts)}")
    return accepted
