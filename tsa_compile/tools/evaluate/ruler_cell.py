"""RULER's cells: left-padded batches of its prompts, greedy answers after a prefill under a plan, scored as RULER does."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tsa_compile.plan import Plan
from tsa_compile.tools.evaluate.prompter import Prompter
from tsa_compile.tools.evaluate.ruler_data import PART, Sample, load, new_tokens, score
from tsa_compile.tools.evaluate.runner import Prefill, Runner

Tensor = torch.Tensor


class RulerCell:
    """`samples` prompts of one task and length; a variant's answers, scored. Decoding is dense."""

    def __init__(
        self, task: str, folder: Path, runner: Runner, prompter: Prompter, length: int, samples: int, batch: int
    ) -> None:
        self._runner, self._prompter = runner, prompter
        self._part, self._new = task in PART, new_tokens(task)
        made = load(folder, task, prompter, length, samples)
        made = sorted(made, key=lambda s: len(s["input"]))  # a batch holds prompts of like lengths
        self._batches = [made[i : i + batch] for i in range(0, len(made), batch)]

    def measure(self, plan: Plan | None) -> dict[str, Any]:
        answers, scores, runs = [], [], []
        for batch in self._batches:
            ids, mask = left_padded([self._prompter.prompt_ids(s["input"]) for s in batch], self._runner.device)
            prefill = self._runner.prefill(ids, plan, mask=mask)
            found = self._answer(prefill, mask, batch)
            answers += found
            scores += [score(text, s["outputs"], self._part) for text, s in zip(found, batch, strict=True)]
            runs.append((prefill.seconds, len(batch), prefill.kept))
        kept = {str(i): sum(r[2][i] for r in runs) / len(runs) for i in runs[0][2]}
        return {
            "score": sum(scores) / len(scores), "scores": scores, "answers": answers, "kept": kept,
            "seconds": min(s / n for s, n, _ in runs), "batch": max(n for _, n, _ in runs),
        }  # fmt: skip

    def _answer(self, prefill: Prefill, mask: Tensor, batch: list[Sample]) -> list[str]:
        runner = self._runner

        @torch.no_grad()
        def step(token: Tensor) -> Tensor:
            nonlocal mask
            mask = torch.cat((mask, mask.new_ones(len(batch), 1)), 1)
            positions = mask.sum(1, keepdim=True) - 1
            step_out = runner.decoder(
                input_ids=token, past_key_values=prefill.cache, attention_mask=mask, position_ids=positions, use_cache=True
            )
            return runner.logits(step_out.last_hidden_state)

        scores = [partial(score, outputs=s["outputs"], part=self._part) for s in batch]
        return greedy(runner.logits(prefill.hidden[:, -1:]), step, self._new, end_tokens(runner.model), self._text, scores)

    def _text(self, ids: list[int]) -> str:
        return answer_text(self._prompter, ids)


def greedy(
    logits: Tensor, step: Callable[[Tensor], Tensor], new: int, ends: set[int], text: Callable[[list[int]], str],
    scores: Sequence[Callable[[str], float]],
) -> list[str]:  # fmt: skip
    """Greedy answers; a sample ends at an end token, or when its answer has the full score, which more text cannot change.

    Args:
        logits: `[B, 1, vocabulary]` of the first token. step: tokens `[B, 1]` -> the logits of the next.
        new: tokens of an answer, at most.
        ends: end tokens. text: of token ids.
        scores: of each sample's text, in [0, 1].
    """
    out: list[list[int]] = [[] for _ in scores]
    open_ = set(range(len(scores)))
    for n in range(new):
        token = logits.argmax(-1)
        for row, t in enumerate(token[:, 0].tolist()):
            if row in open_:
                open_ = open_ - {row} if t in ends else open_
                out[row] += [t] * (row in open_)
        open_ = {row for row in open_ if scores[row](text(out[row])) < 1.0}
        if not open_ or n + 1 == new:
            break
        logits = step(token)
    return [text(ids) for ids in out]


def answer_text(prompter: Prompter, ids: list[int]) -> str:
    """What was written, without the blanks around it and without control characters."""
    return re.sub(r"[\x00-\x1f]", "\n", prompter.decode(ids).strip()).strip()


def left_padded(ids: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(token ids, mask) [B, L] with padding in front."""
    longest = max(map(len, ids))
    padded = [[0] * (longest - len(row)) + row for row in ids]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in ids]
    return torch.tensor(padded, device=device), torch.tensor(mask, device=device)


def end_tokens(model: Any) -> set[int]:
    """Those that end an answer."""
    found = model.generation_config.eos_token_id
    return set(found) if isinstance(found, list) else {found} - {None}
