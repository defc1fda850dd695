"""The loop of speculation: draft, verify, keep what is accepted; until every row has ended."""

from __future__ import annotations

import logging
from typing import Any

import torch

from tsa_compile.generate.accept import Accepted, accept_greedy, accept_sampled
from tsa_compile.generate.draft_loop import why_not
from tsa_compile.generate.drafts import Draft, Proposed, Request
from tsa_compile.generate.payoff import Cost, Payoff
from tsa_compile.generate.settle import Ends
from tsa_compile.speculation import Speculation
from tsa_compile.steps import FIXED, REPLAYED

Tensor = torch.Tensor
log = logging.getLogger("tsa_compile")


class Rounds:
    """One call of `generate()`, from the prefill on.

    Args:
        draft: where drafted tokens come from.
        gamma: how many.
        costs: of the gate.
        request: the tokens, and the model over its cache.
        ends: when rows end.
        streamer: gets each new token; None: there is none.

    Attributes:
        together: do all rows go on by the same number of tokens?
        keeps_scores: fill `scores`.
        scores: scores and logits `[B, V]` of each new token, of rows that go on together.
        seen: what it came to.
    """

    def __init__(
        self, draft: Draft, gamma: int, costs: tuple[Cost, ...], request: Request, ends: Ends, streamer: Any = None
    ) -> None:
        self.draft, self.gamma, self.request, self.ends, self.streamer = draft, gamma, request, ends, streamer
        self.payoff: Payoff | None = Payoff(costs, gamma, ends.max_length - request.rows.prompt)
        self.seen = Speculation(requests=1)
        self.keeps_scores = False
        self.scores: list[tuple[Tensor, Tensor]] = []
        self.together = request.rows.batch == 1

    def note(self, text: str) -> None:
        """To the log and the report."""
        self.seen.notes[text] += 1
        log.warning("speculation: %s", text)

    def go_together(self, why: str) -> None:
        """All rows go on by the same number of tokens."""
        self.together = True
        self.note(f"all rows of the batch go on by the fewest tokens that one of them accepts: {why}")

    def run(self, logits: Tensor) -> None:
        """All new tokens, of which `logits` `[B, 1, V]` is the first's. The cache then lacks the last of each row."""
        self.begin(logits)
        steps = self.request.steps.session.steps
        before = steps.counts()
        while not all(self.request.rows.done):
            self.go_on()
        if self.seen.draft_steps:
            self._look_at_drafts({how: n - before.get(how, 0) for how, n in steps.counts().items()})

    def begin(self, logits: Tensor) -> None:
        """The first token, by `logits` `[B, 1, V]`."""
        self.request.steps.look_at_padding()
        self._part()
        self._settle(logits, None)

    def _look_at_drafts(self, steps: dict[str, int]) -> None:
        """Did the draft's policy run as it was meant to? `steps`: how the request's steps ran, and how many."""
        one_by_one = why_not(self.request.processors)
        if one_by_one is not None:
            self.seen.notes[f"the steps of a draft run one by one: {one_by_one}"] += 1  # what was asked for: no warning
        reasons = self.request.steps.session.backend.why_dense_drafts(self.request.plan)
        self.seen.draft_sites, self.seen.sparse_sites = len(reasons), sum(reason is None for reason in reasons)
        if reasons and not self.seen.sparse_sites:
            self.note(f"drafts read every key: {'; '.join(sorted({reason or '' for reason in reasons}))}")
        others = sorted(how for how, n in steps.items() if n and how not in (FIXED, REPLAYED))
        if others:
            self.note(f"steps do not run on fixed buffers, beside which policies keep what they know: {'; '.join(others)}")

    def _part(self) -> None:
        if self.together:
            return
        why = self.request.steps.why_together() if self.streamer is None else "a streamer takes a token of each row at a time"
        if why is None:
            self.request.steps.part(self.request.rows.batch)
        else:
            self.go_together(why)

    def go_on(self) -> None:
        """A draft and its verification, or one plain step."""
        rows, steps = self.request.rows, self.request.steps
        open_rows = [b for b, done in enumerate(rows.done) if not done]
        last_one = self.ends.max_length - min(rows.lengths[b] for b in open_rows) == 1
        self._ask_gate()
        proposed = None if self.payoff is None or last_one else self.draft.propose(self.request, self.gamma)
        if proposed is None:
            self.seen.plain_steps += 1
            self._settle(steps.step(rows.last()), None)
            self.request.keep_known()  # layers with a window forget what they kept for a crop
            return
        self.seen.draft_steps += 0 if self.draft.policy is None else self.gamma
        self.seen.draft_loops += proposed.at_once
        kept, new = self._settle(steps.step(torch.cat([rows.last(), proposed.tokens], 1)), proposed)
        self.request.keep_known()
        kept, new = [kept[b] for b in open_rows], [new[b] for b in open_rows]
        self.seen.add_verify(kept, new, self.gamma)
        if self.payoff is not None:
            self.payoff.saw(new)

    def _ask_gate(self) -> None:
        why = None if self.payoff is None else self.payoff.why_off(self.request.rows.batch, self.request.steps.length)
        if why is not None:
            self.payoff = None
            self.note(f"switched off for the rest of the request: {why}")

    def _settle(self, logits: Tensor, proposed: Proposed | None) -> tuple[list[int], list[int]]:
        """Accept and append; see `Ends.settle`."""
        request, rows = self.request, self.request.rows
        scores, begin = request.scores(logits), max(rows.lengths)
        drafted, chances = (rows.ids[:, :0], None) if proposed is None else proposed[:2]
        kept, new = self.ends.settle(rows, self.judge(drafted, chances, scores), self.together)
        self.seen.tokens += sum(new)
        for n in range(max(rows.lengths) - begin):
            if self.keeps_scores:
                self.scores.append((scores[:, n], logits[:, n]))
            if self.streamer is not None:
                self.streamer.put(rows.ids[:, begin + n].cpu())
        return kept, new

    def judge(self, drafted: Tensor, chances: Tensor | None, scores: Tensor) -> Accepted:
        """The accept rule, of `scores` `[B, n + 1, V]`."""
        if self.request.sampled:
            return accept_sampled(drafted, chances, scores.softmax(-1))
        return accept_greedy(drafted, scores)
