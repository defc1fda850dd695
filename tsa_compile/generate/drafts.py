"""Where drafted tokens come from: the same weights by a sparse policy, or the tokens themselves."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import torch

from tsa_compile.generate.cached_steps import CachedSteps
from tsa_compile.generate.draft_loop import DraftLoop, why_not
from tsa_compile.generate.sampling import sample
from tsa_compile.generate.token_rows import TokenRows, scores_behind
from tsa_compile.plan import Plan
from tsa_compile.policies.base import Policy
from tsa_compile.reuse import Reuse
from tsa_compile.rules import Rule

Tensor = torch.Tensor


class Proposed(NamedTuple):
    """Drafted tokens.

    Args:
        tokens: int64 `[B, n]`.
        chances: `[B, n, V]`, the distributions that they were sampled from; None: each was certain.
        at_once: came all of them of one call?
    """

    tokens: Tensor
    chances: Tensor | None = None
    at_once: bool = False


@dataclasses.dataclass
class Request:
    """What a draft may look at, and ask the model.

    Args:
        rows: the tokens so far.
        steps: the model over its cache, which lacks each row's last token.
        plan: the policies that run.
        processors: of the scores; the draft's are those of the target.
        sampled: or greedy.
    """

    rows: TokenRows
    steps: CachedSteps
    plan: Plan
    processors: Any
    sampled: bool

    def scores(self, logits: Tensor, behind: int = 0) -> Tensor:
        return scores_behind(self.processors, self.rows, logits, behind)

    def keep_known(self) -> None:
        """The cache keeps each row's tokens but the last."""
        rows = self.rows
        self.steps.keep([length - rows.prompt - 1 for length in rows.lengths], rows.ends[:, 0] - (rows.prompt + 1))


class Draft(Protocol):
    """A source of drafted tokens. `policy`: what its steps of the model run under; None: it has none."""

    @property
    def policy(self) -> Policy | None: ...

    def propose(self, request: Request, n: int) -> Proposed | None:
        """`n` tokens for each row, which stand behind it in `request.rows` then; None: nothing comes to mind, in any row."""


@dataclasses.dataclass(frozen=True)
class PolicyDraft:
    """The model itself, one token at a time, under a policy for drafts. (Vegas, arXiv 2602.07223; MagicDec, 2408.11049.)

    All its steps are one call, and one recording, where they run on fixed buffers and no logits processor looks at the tokens.

    Args:
        policy: of all attentions but those that a rule names.
        rules: exceptions, of phase "draft"; the first that matches decides.
        reuse: attentions that take another one's selection, of phase "draft".
        weights: the file of learned indexes that the policies need; None: they need none.
    """

    policy: Policy
    rules: tuple[Rule, ...] = ()
    reuse: tuple[Reuse, ...] = ()
    weights: str | None = None

    def propose(self, request: Request, n: int) -> Proposed:
        with request.steps.session.backend.under(request.plan, drafting=True):
            proposed = self._at_once(request, n) or self._one_by_one(request, n)
        request.keep_known()
        return proposed

    def _at_once(self, request: Request, n: int) -> Proposed | None:
        """By one call; None: that cannot be."""
        if why_not(request.processors) is not None:
            return None
        drafted = request.steps.loop(request.rows.last(), DraftLoop(n, request.processors, request.sampled))
        if drafted is None:
            return None
        request.rows.propose(drafted.tokens)
        return Proposed(*drafted, at_once=True)

    def _one_by_one(self, request: Request, n: int) -> Proposed:
        rows = request.rows
        token, tokens, chances = rows.last(), [], []
        for i in range(n):
            scores = request.scores(request.steps.step(token), i)[:, 0]
            if request.sampled:
                chances.append(scores.softmax(-1))
            token = sample(chances[-1]) if request.sampled else scores.argmax(-1, keepdim=True)
            rows.propose(token, i)
            tokens.append(token)
        return Proposed(torch.cat(tokens, 1), torch.stack(chances, 1) if chances else None)


@dataclasses.dataclass(frozen=True)
class PromptLookup:
    """What followed the last tokens where they stood before.

    Args:
        longest: as many of the last tokens are looked for, then one less, and so on; the latest place counts.

    Raises:
        ValueError: `longest` is no number of tokens.
    """

    longest: int = 3

    def __post_init__(self) -> None:
        if type(self.longest) is not int or self.longest < 1:
            raise ValueError(f"PromptLookup.longest must be an int of at least 1, got {self.longest!r}")

    @property
    def policy(self) -> None:
        return None

    def propose(self, request: Request, n: int) -> Proposed | None:
        """Rows in which nothing is found guess their last token again: a guess may be anything."""
        rows = request.rows
        found = [self._continued(rows.ids[b, :length]) for b, length in enumerate(rows.lengths)]
        if all(f is None for f in found):
            return None
        guesses = rows.last().repeat(1, n)
        for guess, known in zip(guesses, found, strict=True):
            if known is not None:
                guess[: len(known)] = known[:n]
        rows.propose(guesses)
        return Proposed(guesses)

    def _continued(self, ids: Tensor) -> Tensor | None:
        """What followed, up to the end."""
        for size in range(min(self.longest, len(ids) - 1), 0, -1):
            same = (ids.unfold(0, size, 1)[:-1] == ids[-size:]).all(1).nonzero()
            if len(same):
                return ids[int(same[-1]) + size :]
        return None
