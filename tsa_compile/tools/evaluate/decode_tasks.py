"""Tasks whose answers are decoded under a policy after a dense prefill: RULER's, and our own, which may be shorter."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from tsa_compile.plan import Plan
from tsa_compile.tools.evaluate import tasks
from tsa_compile.tools.evaluate.cells import DEPTHS, GENERATORS, NEEDLE, TURNS
from tsa_compile.tools.evaluate.decode_cells import SEED, Values
from tsa_compile.tools.evaluate.decode_runner import DecodeRunner, Request
from tsa_compile.tools.evaluate.prompter import Prompter
from tsa_compile.tools.evaluate.ruler_cell import answer_text, end_tokens, greedy, left_padded
from tsa_compile.tools.evaluate.ruler_data import PART, load, new_tokens, score
from tsa_compile.tools.evaluate.ruler_data import TASKS as RULER

Tensor = torch.Tensor
OWN = tuple(task for task in (NEEDLE, *GENERATORS) if task != TURNS)


class Prompt(NamedTuple):
    """Token ids, what the answer must name, and how many tokens it may have."""

    ids: list[int]
    outputs: Sequence[str]
    new: int


class TaskCell:
    """`samples` prompts of one task: all but the last token are read by the model as it is, the rest is decoded under the plan.

    So every token of an answer comes from a decode step.
    """

    def __init__(
        self, task: str, folder: Path, runner: DecodeRunner, prompter: Prompter, length: int, samples: int, batch: int
    ) -> None:
        self._runner, self._prompter, self._part = runner, prompter, task in PART
        if task in RULER:
            made = [
                Prompt(prompter.prompt_ids(s["input"]), s["outputs"], new_tokens(task))
                for s in load(folder, task, prompter, length, samples)
            ]
        else:
            made = own_prompts(task, prompter, length, samples)
        order = sorted(range(len(made)), key=lambda n: len(made[n].ids))  # a batch holds prompts of like lengths
        made = [made[n] for n in order]
        self._batches = [self._read(made[i : i + batch]) for i in range(0, len(made), batch)]

    def _read(self, prompts: list[Prompt]) -> tuple[list[Prompt], Tensor, Request]:
        ids, mask = left_padded([p.ids for p in prompts], self._runner.device)
        padding = None if len({len(p.ids) for p in prompts}) == 1 else mask[:, :-1]
        request = self._runner.prefill(ids[:, :-1], max(p.new for p in prompts) + 1, padding)
        return prompts, ids[:, -1:], request

    def measure(self, plan: Plan) -> Values:
        """Greedy answers and their scores; of equal order in every call."""
        answers: list[str] = []
        scores: list[float] = []
        self._runner.use(plan)
        torch.manual_seed(SEED)
        for prompts, last, read in self._batches:
            found = self._answer(prompts, last, read.copied())
            answers += found
            scores += [score(text, list(p.outputs), self._part) for text, p in zip(found, prompts, strict=True)]
        return {"score": sum(scores) / len(scores), "scores": scores, "answers": answers}

    def _answer(self, prompts: list[Prompt], last: Tensor, request: Request) -> list[str]:
        runner = self._runner
        step = partial(runner.step, request=request)
        scores = [partial(score, outputs=list(p.outputs), part=self._part) for p in prompts]
        text, new = partial(answer_text, self._prompter), max(p.new for p in prompts)
        return greedy(step(last), step, new, end_tokens(runner.model), text, scores)


def own_prompts(task: str, prompter: Prompter, length: int, samples: int, seed: int = 0) -> list[Prompt]:
    """Prompts of one of OWN, with answers at most `length` tokens long; of the needle, its depths in turn."""
    made = []
    for n in range(seed, seed + samples):
        rng = random.Random(f"{task}/{n}")
        one = tasks.needle(rng, DEPTHS[n % len(DEPTHS)]) if task == NEEDLE else GENERATORS[task](rng)
        question = one.question
        ids = prompter.prompt(one, length - question.new_tokens, n)
        made.append(Prompt(ids, question.answers, question.new_tokens))
    return made
