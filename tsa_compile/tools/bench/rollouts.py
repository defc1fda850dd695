"""`tsa-compile bench rollout`: tokens a second that a rollout draws, by a schedule of pages and by exact decode, in one run.

All samples go on behind one prompt, which is read once. A case runs twice, for a few tokens and for many: the difference is
decode steps alone, with sampling and what the host does between steps. Schedules and exact decode take turns.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import torch

from tsa_compile.generate.rollout import Rollouts
from tsa_compile.generate.rollout_batch import Drawing, RolloutBatch
from tsa_compile.learn.gate import pages_read, schedule_plan
from tsa_compile.plan import Plan
from tsa_compile.policies.dense import Dense
from tsa_compile.policies.exact import Exact
from tsa_compile.steps import REPLAYED

EXACT = "exact decode"
FEW = 8  # tokens of the short run


@dataclasses.dataclass(frozen=True)
class RolloutRow:
    """One way to decode.

    Args:
        decode: a schedule's name, or "exact decode".
        batch, past, new: samples, tokens of the prompt, tokens of each sample.
        pages: the share of the pages that layers under the schedule read.
        step_ms: of a decode step, median.
        tokens_per_second: of the batch.
        speedup: over exact decode.
        replayed: the share of the steps that were replays of a recorded graph.
    """

    decode: str
    batch: int
    past: int
    new: int
    pages: float
    step_ms: float
    tokens_per_second: float
    speedup: float
    replayed: float


def bench_rollout(
    model: Any, schedules: list[str], batch: int, past: int, new: int, repeats: int = 3, compiler: str = "eager"
) -> list[RolloutRow]:
    """Exact decode, then each schedule.

    Args:
        model: a decoder of transformers, on the device that is timed.
        new: tokens of a sample in the long run, more than `FEW`.
        compiler: as of `transform`, for all of them.

    Raises:
        ValueError: `new` is too small, or a schedule is none.
    """
    if new <= FEW:
        raise ValueError(f"new must be above {FEW}, got {new}")
    plans = {EXACT: Plan(prefill=Dense(), decode=Exact()), **{name: schedule_plan(name) for name in schedules}}
    rollouts = Rollouts(model, plans[EXACT], batch=batch, rows_at_once=1, compiler=compiler)
    prompt = torch.randint(1, model.config.vocab_size, (past,), device=model.device)
    took: dict[str, list[float]] = {name: [] for name in plans}
    replays: dict[str, list[float]] = {name: [] for name in plans}
    for turn in range(repeats + 1):
        for name, plan in plans.items():
            rollouts.plan = plan
            short, _ = _seconds(rollouts, prompt, batch, FEW)
            long, replayed = _seconds(rollouts, prompt, batch, new)
            if turn:  # the first one compiles and records
                took[name].append((long - short) / (new - FEW))
                replays[name].append(replayed)
    step = {name: statistics.median(each) for name, each in took.items()}
    positions = range(past, past + new)
    rows = []
    for name in plans:
        pages = 1.0 if name == EXACT else pages_read(name, positions)
        speed, replayed = batch / step[name], statistics.fmean(replays[name])
        rows.append(RolloutRow(name, batch, past, new, pages, 1e3 * step[name], speed, step[EXACT] / step[name], replayed))
    return rows


@torch.no_grad()
def _seconds(rollouts: Rollouts, prompt: torch.Tensor, batch: int, new: int) -> tuple[float, float]:
    """Wall time of a rollout without its scoring pass, and the share of its steps that were replayed."""
    steps = rollouts.session.steps
    before = steps.counts().get(REPLAYED, 0)
    how = Drawing(1.0, (), rollouts.top, rollouts.look_every, rollouts.rows_at_once, None)
    _wait(prompt.device)
    began = time.monotonic()
    with rollouts.session.backend.under(rollouts.plan):
        running = RolloutBatch(rollouts.model, rollouts.session, [prompt] * batch, batch, new, how)
        running.run()
    _wait(prompt.device)
    return time.monotonic() - began, (steps.counts().get(REPLAYED, 0) - before) / max(1, running.steps)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def told(row: RolloutRow) -> str:
    """One line for a reader."""
    size = f"{row.batch} samples behind {row.past} tokens"
    speed = f"{row.tokens_per_second:.0f} tokens/s, {row.step_ms:.2f} ms a step, {row.speedup:.2f}x exact"
    return f"{row.decode}: {size}, {row.pages:.1%} of the pages: {speed}; {row.replayed:.0%} of the steps replayed"
