"""What speculation came to: tokens a verify, acceptance by place, the model's steps of each kind, what was switched off."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence


@dataclasses.dataclass
class Speculation:
    """Counts over requests. A batch row counts for itself, in what is said of rows.

    Args:
        requests: calls of `generate()`.
        tokens: new tokens of rows, with the first ones, which the prefills gave.
        verified: verify steps that a row took part in before it ended.
        verified_tokens: the tokens that these gave.
        draft_steps: of the model.
        draft_loops: drafts whose steps were one call, and one CUDA graph where steps are recorded.
        verify_steps: of the model.
        plain_steps: of the model, one token each: without a draft, or with one token left.
        draft_sites: attentions in the graphs of draft steps with the last request's draft.
        sparse_sites: of these, those that the draft's policy has taken; the others read every key.
        reached: by place in the draft: rows whose tokens before it were all kept.
        kept: by place in the draft: rows that kept it, too.
        notes: what the log was told, and how often.
    """

    requests: int = 0
    tokens: int = 0
    verified: int = 0
    verified_tokens: int = 0
    draft_steps: int = 0
    draft_loops: int = 0
    verify_steps: int = 0
    plain_steps: int = 0
    draft_sites: int = 0
    sparse_sites: int = 0
    reached: Counter[int] = dataclasses.field(default_factory=Counter)
    kept: Counter[int] = dataclasses.field(default_factory=Counter)
    notes: Counter[str] = dataclasses.field(default_factory=Counter)

    @property
    def tokens_a_verify(self) -> float:
        """New tokens of a row in one verify step: 1 to gamma + 1; 0: there was none."""
        return self.verified_tokens / self.verified if self.verified else 0.0

    @property
    def acceptance(self) -> list[float]:
        """By place in the draft: the share kept of what was reached."""
        return [self.kept[place] / self.reached[place] for place in sorted(self.reached)]

    def add_verify(self, kept: Sequence[int], new: Sequence[int], drafted: int) -> None:
        """A verify step of `drafted` tokens: of each row that takes part, what the rule kept, and its new tokens."""
        self.verify_steps += 1
        self.verified += len(kept)
        self.verified_tokens += sum(new)
        for n in kept:
            self.reached.update(range(min(n + 1, drafted)))
            self.kept.update(range(n))

    def plus(self, other: Speculation) -> Speculation:
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)}
        return Speculation(**{**sums, "draft_sites": other.draft_sites, "sparse_sites": other.sparse_sites})

    def __str__(self) -> str:
        by_place = " ".join(f"{share:.2f}" for share in self.acceptance)
        drafts = f"{self.draft_steps} draft ({self.draft_loops} drafts at once)"
        steps = f"{drafts}, {self.verify_steps} verify, {self.plain_steps} plain"
        line = (
            f"{self.requests} request(s), {self.tokens} tokens; {self.tokens_a_verify:.2f} tokens a verify; steps: {steps}; "
            f"acceptance by place: {by_place or 'none'}"
        )
        if self.draft_sites:
            line += f"; {self.sparse_sites} of {self.draft_sites} attentions of draft steps by their policy"
        return "\n".join([line, *(f"{note} ({times} times)" for note, times in self.notes.items())])
