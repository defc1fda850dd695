"""`tsa-compile bench round`: rounds of speculation beside exact decoding, in one run, at an acceptance that is given.

Random weights accept next to nothing, so drafted tokens are kept by a coin, whose bias gives the tokens a round that real
models gave (`tsa-compile bench acceptance`); everything else of a round runs, the accept rule included.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from tsa_compile.generate import draft_table
from tsa_compile.generate.accept import Accepted, leading
from tsa_compile.generate.draft_table import DraftTiming
from tsa_compile.generate.drafts import Draft, Request
from tsa_compile.generate.named_drafts import as_draft
from tsa_compile.generate.payoff import Cost
from tsa_compile.generate.rounds import Rounds
from tsa_compile.generate.settle import Ends
from tsa_compile.generate.speculative_plan import speculating
from tsa_compile.generate.token_rows import TokenRows
from tsa_compile.plan import Plan
from tsa_compile.policies.base import Policy
from tsa_compile.policies.dense import Dense
from tsa_compile.policies.exact import Exact
from tsa_compile.speculation import Speculation
from tsa_compile.tools.bench.round_costs import exact_ms, keep_all, step_times, timed_step
from tsa_compile.tools.bench.round_requests import filled_cache, now, request_over, transformed

WARM_ROUNDS, REFUSED = 4, 0.1  # rounds before those that are timed; the coin's bias for texts that nothing can draft
Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class RoundCase:
    """`batch` rows of `length` tokens; `gamma` drafted ones, of which a round gives `given` in the mean; `gated` new tokens for
    the gate's part; `rounds` and `repeats` that are timed."""

    batch: int
    length: int
    gamma: int = 6
    given: float = 6.0
    rounds: int = 24
    repeats: int = 12
    gated: int = 256

    def __post_init__(self) -> None:
        if not 1 <= self.given <= self.gamma + 1:
            raise ValueError(f"given must be tokens of a round, from 1 to gamma + 1 = {self.gamma + 1}, got {self.given}")

    @property
    def room(self) -> int:
        """Rows behind the prompt."""
        return max(self.gated, (self.rounds + WARM_ROUNDS) * (self.gamma + 1)) + self.gamma + 2

    @property
    def bias(self) -> float:
        """The coin's, by which `1 + a + ... + a**gamma` tokens of a round are `given`."""
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(middle**n for n in range(self.gamma + 1)) < self.given else (low, middle)
        return low


@dataclasses.dataclass(frozen=True)
class ExactTimes:
    """Milliseconds of an exact step: calls one behind another, and a token of `generate()`."""

    step: float
    token: float


@dataclasses.dataclass(frozen=True)
class RoundRow:
    """One draft. Milliseconds, and ratios over exact decoding of the same run.

    Args:
        draft_ms, verify_ms, at_once: see `StepTimes`.
        round_ms: wall time of a round; host_ms: what of it is neither draft nor verify step.
        t, c, v: tokens a round as they came; draft and verify step over the exact one (`ExactTimes.step`).
        bound: t / (gamma c + v). speedup: tokens a second over those of `generate()`. of_bound: its share of the bound.
        gate: tokens a second over those of `generate()` where drafts are refused, with the gate's table from this run.
        gate_note: why it switched off. tokens_per_second: of all rows, and of exact decoding.
        steps: how steps ran. sparse: attentions of draft steps by their policy, of all.
    """

    case: RoundCase
    draft: str
    exact: ExactTimes
    draft_ms: float
    verify_ms: float
    at_once: bool
    round_ms: float
    host_ms: float
    t: float
    c: float
    v: float
    bound: float
    speedup: float
    of_bound: float
    gate: float
    gate_note: str
    tokens_per_second: tuple[float, float]
    steps: dict[str, int]
    sparse: tuple[int, int]


class ForcedRounds(Rounds):
    """Rounds whose drafts are kept by a coin of the bias `bias`."""

    bias = 0.0

    def judge(self, drafted: Tensor, chances: Tensor | None, scores: Tensor) -> Accepted:
        own = super().judge(drafted, chances, scores)
        kept = leading(torch.rand(drafted.shape, device=drafted.device) < self.bias)
        places = torch.arange(own.tokens.shape[1], device=kept.device)
        tokens = torch.where(places < kept[:, None], torch.cat([drafted, own.tokens[:, -1:]], 1), own.tokens)
        return Accepted(kept, tokens)


def measure_exact(model: Any, case: RoundCase, compiler: str = "eager") -> ExactTimes:
    """Exact decoding without anything of speculation."""
    plan = Plan(prefill=Dense(), decode=Exact())
    with transformed(model, plan, compiler) as session:
        cache = filled_cache(model, session.plan, case.batch, case.length, case.room)
        request = request_over(model, session, cache, case.room)
        return ExactTimes(*exact_ms(model, request, cache, case.repeats))


def measure_rounds(
    model: Any,
    case: RoundCase,
    name: str,
    draft: Any,
    exact: ExactTimes,
    compiler: str = "eager",
    processors: Any = (),
    sampled: bool = False,
) -> RoundRow:
    """Steps alone, rounds at the given acceptance, and the gate where it should be off. The model is as it was afterwards."""
    made = as_draft(draft)
    plan = speculating(Plan(prefill=Dense(), decode=Exact()), made)
    with transformed(model, plan, compiler) as session:
        cache = filled_cache(model, session.plan, case.batch, case.length, case.room)
        request = request_over(model, session, cache, case.room, processors, sampled)
        if case.batch > 1 and request.steps.why_together() is None:
            request.steps.part(case.batch)
        times = step_times(request, made, case.gamma, case.repeats)
        c, v = times.draft / exact.step, times.verify / exact.step
        timed_step(request, 1, 1)  # what the gate goes on with is recorded, too
        round_s, t = _rounds(_anew(request, case), made, case)
        keep_all(request)
        gated_s, note = _gated(_anew(request, case), made, case, Cost(case.batch, case.length, c, v))
        reasons = session.backend.why_dense_drafts(session.plan)
        sparse = sum(reason is None for reason in reasons), len(reasons)
        bound, speedup = t / (case.gamma * c + v), exact.token * t / (1e3 * round_s)
        per_second = 1e3 * case.batch / exact.token
        return RoundRow(
            case, name, exact, times.draft, times.verify, times.at_once, 1e3 * round_s,
            1e3 * round_s - case.gamma * times.draft - times.verify, t, c, v, bound, speedup, speedup / bound,
            exact.token * case.gated / (1e3 * gated_s), note, (speedup * per_second, per_second), session.steps.counts(), sparse,
        )  # fmt: skip


def _anew(request: Request, case: RoundCase) -> Request:
    """The same prompt, without new tokens."""
    rows = TokenRows(request.rows.ids[:, : request.rows.prompt], case.room, 0)
    return dataclasses.replace(request, rows=rows)


def _begun(request: Request, draft: Draft, case: RoundCase, costs: tuple[Cost, ...], bias: float, new: int) -> ForcedRounds:
    """Rounds behind a first token, which is any."""
    rounds = ForcedRounds(draft, case.gamma, costs, request, Ends([], request.rows.prompt + new))
    rounds.bias = bias
    vocabulary = request.steps.model.config.get_text_config().vocab_size
    rounds.begin(torch.randn(case.batch, 1, vocabulary, device=request.rows.ids.device))
    return rounds


def _rounds(request: Request, draft: Draft, case: RoundCase) -> tuple[float, float]:
    """(wall seconds of a round, tokens of a row in it)."""
    rounds = _begun(request, draft, case, (), case.bias, case.room - case.gamma - 1)
    for _ in range(WARM_ROUNDS):
        rounds.go_on()
    rounds.seen = Speculation(requests=1)
    device = request.rows.ids.device
    start = now(device)
    for _ in range(case.rounds):
        rounds.go_on()
    return (now(device) - start) / case.rounds, rounds.seen.tokens_a_verify


def _gated(request: Request, draft: Draft, case: RoundCase, cost: Cost) -> tuple[float, str]:
    """(wall seconds of `case.gated` tokens of each row whose drafts are refused, why the gate switched off)."""
    device = request.rows.ids.device
    start = now(device)
    rounds = _begun(request, draft, case, (cost,), REFUSED, case.gated)
    while not all(request.rows.done):
        rounds.go_on()
    return now(device) - start, "; ".join(rounds.seen.notes)


def timing_of(row: RoundRow, model: Any, policy: Policy, compiler: str) -> DraftTiming:
    """The row for `draft="measured"`; by the tokens a round that were asked for, not those that the coin came to."""
    case, where = row.case, (draft_table.device_of(model), draft_table.shape_of(model), compiler)
    took = (row.draft_ms, row.verify_ms, row.round_ms, row.exact.token)
    return DraftTiming(*where, case.batch, case.length, row.draft, policy.to_dict(), case.gamma, case.given, *took)


def told(row: RoundRow) -> str:
    """Two lines for a reader."""
    case, (own, exact) = row.case, row.tokens_per_second
    name = f"B{case.batch} {case.length} tokens, {row.draft}, gamma {case.gamma}"
    costs = f"c {row.c:.3f}, v {row.v:.3f}, t {row.t:.2f}: bound {row.bound:.2f}x"
    speed = f"{own:.1f} tokens/s against {exact:.1f}: {row.speedup:.2f}x, {row.of_bound:.0%} of the bound"
    drafts = f"draft step {row.draft_ms:.2f}{'' if row.at_once else ' (one by one)'}"
    rounds = f"verify {row.verify_ms:.2f}, round {row.round_ms:.2f}, of it host {row.host_ms:.2f}"
    times = f"exact step {row.exact.step:.2f} ms, token {row.exact.token:.2f}; {drafts}, {rounds}"
    return f"{name}: {costs}; {speed}; gate {row.gate:.3f}x\n  {times}; {row.sparse[0]} of {row.sparse[1]} attentions sparse"
