"""The contract of speculation, checked token by token: what exact decoding gave, and what a draft's rounds gave.

In float32 tokens are equal. In half precision a step of one row and one of several round differently, so they are equal up to the
first token whose two largest logits, of exact decoding, are within `MARGIN`; such places are listed.

That is for drafts. The untouched model sums in another order than exact decoding, and one step of a bfloat16 logit of 16 to 32 is
.125 already, so in half precision its places are listed and not judged.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MARGIN = 0.1  # of logits, in half precision
Result = Mapping[str, Any]  # of one batch, as `lossless` keeps it


@dataclasses.dataclass(frozen=True)
class Divergence:
    """The first token of a prompt that is another one.

    Args:
        prompt: its number.
        at: place among the new tokens.
        want, got: the token of exact decoding (or of the untouched model, where that is compared), and the other.
        gap: by how much the largest logit of exact decoding was above the second there.
    """

    prompt: int
    at: int
    want: int
    got: int
    gap: float


@dataclasses.dataclass(frozen=True)
class LosslessRow:
    """One draft against exact decoding on the same cache; or, "exact", exact decoding against the untouched model.

    Args:
        dtype: of the model.
        draft: what was compared.
        prompts, equal: how many, and those whose tokens are all equal.
        held: is it as the contract has it?
        divergences: of the other prompts.
        tokens_a_verify: of gamma + 1; 0: nothing was verified.
        sparse: attentions of draft steps by their policy, of all, in the batch with the least share.
    """

    dtype: str
    draft: str
    prompts: int
    equal: int
    held: bool
    divergences: tuple[Divergence, ...]
    tokens_a_verify: float
    sparse: tuple[int, int]


def row_of(dtype: str, draft: str, want: Sequence[Result], got: Sequence[Result], exact: Sequence[Result]) -> LosslessRow:
    """What the batches of one draft come to.

    Args:
        want, got: batches with "tokens", of each row as many; of drafts with what speculation counted.
        exact: exact decoding's, with "gaps", one for each token.
    """
    found = tuple(_divergences(want, got, exact))
    limit = 0.0 if dtype == "float32" else math.inf if draft == "exact" else MARGIN
    counts = [batch.get("seen", (0, 0, 0, 0)) for batch in got]
    verified, tokens = (sum(batch[n] for batch in counts) for n in (0, 1))
    prompts = sum(len(batch["tokens"]) for batch in got)
    held = all(limit > 0 and d.gap <= limit for d in found)
    _, _, *sparse = min(counts, key=lambda batch: batch[2] / max(1, batch[3]))
    a_verify = round(tokens / max(1, verified), 3)
    return LosslessRow(dtype, draft, prompts, prompts - len(found), held, found, a_verify, (sparse[0], sparse[1]))


def _divergences(want: Sequence[Result], got: Sequence[Result], exact: Sequence[Result]) -> Iterator[Divergence]:
    prompt = 0
    for wanted, found, known in zip(want, got, exact, strict=True):
        for a, b, gaps in zip(wanted["tokens"], found["tokens"], known["gaps"], strict=True):
            at = next((n for n, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]), None)
            if at is not None:
                yield Divergence(prompt, at, a[at], b[at], gaps[at])
            prompt += 1


def told(row: LosslessRow) -> str:
    """A line for a reader, and one for each divergence."""
    against = "the untouched model" if row.draft == "exact" else "exact decoding"
    how = f"; {row.tokens_a_verify:.2f} tokens a verify" if row.tokens_a_verify else ""
    how += f", {row.sparse[0]} of {row.sparse[1]} attentions of draft steps by their policy" if row.sparse[1] else ""
    judged = row.draft != "exact" or row.dtype == "float32"
    verdict = f"contract {'held' if row.held else 'BROKEN'}" if judged else "not judged"
    lines = [f"{row.dtype}, {row.draft}: {verdict}; {row.equal} of {row.prompts} prompts as {against} has them{how}"]
    for d in row.divergences:
        lines.append(f"  prompt {d.prompt}, new token {d.at}: {d.got} in place of {d.want}, whose logit was ahead by {d.gap:.4f}")
    return "\n".join(lines)
