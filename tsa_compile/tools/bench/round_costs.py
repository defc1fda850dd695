"""What draft and verify steps of a model cost beside its exact steps, on this machine: the lines of `speculative(costs=...)`."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import torch

from tsa_compile.cache.names import CACHES, cache_name
from tsa_compile.generate.cached_steps import CachedSteps
from tsa_compile.generate.drafts import as_draft
from tsa_compile.generate.payoff import Cost
from tsa_compile.generate.speculative_plan import plan_of, session_of

WARMUP = 3  # rounds: a step runs, is recorded, is replayed


@dataclasses.dataclass(frozen=True)
class RoundCost:
    """One batch and length.

    Args:
        cost: as the gate takes it.
        gamma: tokens of a draft; the verify step has one more.
        exact_ms: wall time of an exact decode step, with what the host does between steps.
        steps: how the steps ran, and how many.
    """

    cost: Cost
    gamma: int
    exact_ms: float
    steps: dict[str, int]


def measure_round(model: Any, draft: Any, batch: int, length: int, gamma: int, repeats: int = 15) -> RoundCost:
    """Medians of the three kinds of step, in turns, over a cache of `length` random tokens; the model stays transformed.

    Sampling, logits processors and the choice between drafted tokens are left out.
    """
    draft = as_draft(draft)
    session = session_of(model, draft.policy)
    plan = plan_of(session, draft.policy)
    before = session.steps.counts()
    seconds: dict[str, list[float]] = {"exact": [], "draft": [], "verify": []}
    with torch.no_grad(), session.backend.under(plan):
        ids, steps = _filled(model, session, batch, length, gamma)
        for _ in range(WARMUP + repeats):
            for kind, rows in (("verify", gamma + 1), ("draft", 1), ("exact", 1)):
                seconds[kind].append(_seconds(steps, ids[:, :rows], plan, kind == "draft" and draft.policy is not None))
    exact, drafted, verify = (statistics.median(seconds[kind][WARMUP:]) for kind in ("exact", "draft", "verify"))
    ran = {how: n - before.get(how, 0) for how, n in session.steps.counts().items()}
    share = 0.0 if draft.policy is None else drafted / exact
    return RoundCost(Cost(batch, length, round(share, 4), round(verify / exact, 4)), gamma, round(1e3 * exact, 4), ran)


def _filled(model: Any, session: Any, batch: int, length: int, gamma: int) -> tuple[torch.Tensor, CachedSteps]:
    """Random tokens, and steps behind a prefill of them; rows of a batch apart, as generation has them where they can be."""
    from transformers import DynamicCache

    ids = torch.randint(model.config.vocab_size, (batch, length), device=model.device)
    outputs = model(input_ids=ids, use_cache=True, return_dict=True, logits_to_keep=1, **_cache(model, DynamicCache))
    name = next(name for name in CACHES if outputs.get(name) is not None)
    positions = torch.arange(length, device=ids.device).expand(batch, -1)
    steps = CachedSteps(model, session, outputs[name], {"position_ids": positions}, 2 * gamma + 1)
    if batch > 1 and steps.why_together() is None:
        steps.part(batch)
    return ids, steps


def _cache(model: Any, make: Any) -> dict[str, Any]:
    name = cache_name(model)
    assert name is not None
    return {name: make(config=model.config)}


def _seconds(steps: CachedSteps, tokens: torch.Tensor, plan: Any, drafting: bool) -> float:
    """One step behind the prompt, from a device that waits until it waits again; taken back afterwards."""
    start = _now(tokens.device)
    with steps.session.backend.under(plan, drafting):
        steps.step(tokens)
    end = _now(tokens.device)
    steps.keep([0] * len(tokens))
    return end - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
