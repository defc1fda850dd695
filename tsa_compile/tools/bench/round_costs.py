"""What draft and verify steps of a model cost beside its exact steps, on this machine: the lines of `speculative(costs=...)`."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from tsa_compile.cache.names import cache_name
from tsa_compile.generate.draft_loop import DraftLoop
from tsa_compile.generate.drafts import Draft, Request
from tsa_compile.tools.bench.round_requests import now, seconds_of

WARMUP = 3  # of each kind of step: it runs, is recorded, is replayed
NEW = 24  # tokens of `generate()` that are timed


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """Milliseconds of calls one behind another.

    Args:
        draft: of one of the `gamma` steps of a draft; 0: without the model.
        verify: of the step over `gamma + 1` tokens.
        at_once: were the steps of a draft one call?
    """

    draft: float
    verify: float
    at_once: bool


def exact_ms(model: Any, request: Request, cache: Any, repeats: int) -> tuple[float, float]:
    """Milliseconds of an exact step: of calls one behind another, and of `generate()`, which looks at each token."""
    step = timed_step(request, 1, repeats)
    kept = cache.get_seq_length()
    took = []
    for new in (4, 4, 4 + NEW):
        ids = torch.randint(2, 100, (request.rows.batch, cache.get_seq_length() + 1), device=model.device)
        options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        name = cache_name(model)
        assert name is not None
        start = now(model.device)
        model.generate(ids, attention_mask=torch.ones_like(ids), **{name: cache}, **options)
        took.append(now(model.device) - start)
    cache.crop(kept - cache.get_seq_length())
    return step, 1e3 * (took[2] - took[1]) / NEW


def step_times(request: Request, draft: Draft, gamma: int, repeats: int) -> StepTimes:
    """Of a draft and its verification; the cache is as it was afterwards."""
    verify = timed_step(request, gamma + 1, repeats)
    if draft.policy is None:
        return StepTimes(0.0, verify, at_once=True)
    loop, token = DraftLoop(gamma, request.processors, request.sampled), request.rows.last()
    with request.steps.session.backend.under(request.plan, drafting=True):
        at_once = request.steps.loop(token, loop) is not None
        keep_all(request)
        if not at_once:
            return StepTimes(timed_step(request, 1, repeats), verify, at_once=False)

        def drafted() -> None:
            request.steps.loop(token, loop)
            keep_all(request)

        return StepTimes(1e3 * _warm(drafted, repeats, token.device) / gamma, verify, at_once=True)


def timed_step(request: Request, rows: int, repeats: int) -> float:
    """Milliseconds of a step of `rows` tokens, behind the prompt."""
    tokens = request.rows.ids.new_ones(request.rows.batch, rows)

    def step() -> None:
        request.steps.step(tokens)
        keep_all(request)

    return 1e3 * _warm(step, repeats, tokens.device)


def keep_all(request: Request) -> None:
    """Back to the prompt."""
    request.steps.keep([0] * request.rows.batch, torch.zeros_like(request.rows.ends[:, 0]))


def _warm(work: Any, repeats: int, device: torch.device) -> float:
    seconds_of(work, WARMUP, device)
    return seconds_of(work, repeats, device)
