"""The cells of an evaluation: what is asked, in batches, and what is measured of a variant."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tsa_compile.plan import Plan
from tsa_compile.tools.evaluate import tasks
from tsa_compile.tools.evaluate.anatomy import head_overlap, time_split
from tsa_compile.tools.evaluate.losses import divergence, token_losses
from tsa_compile.tools.evaluate.prompter import Prompter
from tsa_compile.tools.evaluate.runner import Prefill, Runner
from tsa_compile.tools.evaluate.tasks import Task, score

Tensor = torch.Tensor
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
LAST = 128  # last predictions that are compared
TEXT, INSIDE, NEEDLE, TURNS = "text", "inside", "needle", "multi_turn"
GENERATORS: dict[str, Callable[[random.Random], Task]] = {
    "multi_key": tasks.multi_key,
    "multi_value": tasks.multi_value,
    "variable_tracking": tasks.variable_tracking,
    "common_words": tasks.common_words,
    TURNS: tasks.multi_turn,
}
TASKS = (TEXT, INSIDE, NEEDLE, *GENERATORS)
Values = dict[str, Any]


class RetrievalCell:
    """`samples` prompts of one task and length (of the needle: at each depth); a variant's answers, scored, and the loss of the
    right answer."""

    def __init__(self, task: str, runner: Runner, prompter: Prompter, length: int, samples: int, batch: int) -> None:
        self._runner, self._prompter = runner, prompter
        self._samples = samples
        made = _tasks(task, samples)
        after = max(t.question.new_tokens for t in made)
        if made[0].follow_up is not None:
            after += len(prompter.follow_ups(made)[0])
        ids = [prompter.prompt(t, length - after, seed) for seed, t in enumerate(made)]
        self._batches = [(made[i : i + batch], _tensor(ids[i : i + batch], runner)) for i in range(0, len(made), batch)]

    def measure(self, plan: Plan | None) -> Values:
        first: list[tuple[float, float]] = []
        second: list[tuple[float, float]] = []
        prefills = []
        for batch, ids in self._batches:
            prefill = self._runner.prefill(ids, plan)
            prefills.append((prefill.seconds, ids.shape[0], prefill.kept))
            if batch[0].follow_up is not None:
                second += self._second_turn(batch, prefill, plan)
            first += self._answers(prefill, [t.question for t in batch])
        values = {**_scored(second or first, self._samples), **_prefills(prefills)}
        return {**values, "first_turn": _mean([s for s, _ in first])} if second else values

    def _second_turn(self, batch: Sequence[Task], prefill: Prefill, plan: Plan | None) -> list[tuple[float, float]]:
        """The second question on a copy of the cache, with the right first answer in between."""
        chunk = _tensor(self._prompter.follow_ups(batch), self._runner)
        after = self._runner.prefill(chunk, plan, copy.deepcopy(prefill.cache))
        return self._answers(after, [t.follow_up for t in batch if t.follow_up])

    def _answers(self, prefill: Prefill, questions: Sequence[tasks.Question]) -> list[tuple[float, float]]:
        """(score, loss of the right answer) of each sample; uses the cache up."""
        losses = self._runner.answer_losses(prefill, [self._prompter.answer(q) for q in questions])
        out = self._runner.decode(prefill, max(q.new_tokens for q in questions))
        scores = [score(self._prompter.decode(ids), q.answers) for ids, q in zip(out, questions, strict=True)]
        return list(zip(scores, losses, strict=True))


class TextCell:
    """`samples` passages of the reference text: perplexity, and divergence from dense over the last predictions."""

    def __init__(self, runner: Runner, prompter: Prompter, length: int, samples: int, batch: int) -> None:
        self._runner = runner
        ids = [prompter.text(length, i, samples) for i in range(samples)]
        self._batches = [_tensor(ids[i : i + batch], runner) for i in range(0, samples, batch)]
        self._dense = [runner.prefill(b, None).hidden[:, -LAST:].clone() for b in self._batches]

    def measure(self, plan: Plan | None) -> Values:
        values: dict[str, list[float]] = {"nll_all": [], "nll_last": [], "kl": [], "top1": []}
        prefills = []
        self._runner.prefill(self._batches[0][:2], plan)  # the passes run and kernels compile once a plan: not in its time
        for ids, dense in zip(self._batches, self._dense, strict=True):
            prefill = self._runner.prefill(ids, plan)
            prefills.append((prefill.seconds, ids.shape[0], prefill.kept))
            losses = token_losses(self._runner, prefill.hidden, ids)
            compared = divergence(self._runner, dense, prefill.hidden[:, -LAST:])
            values["nll_all"] += losses.mean(1).tolist()
            values["nll_last"] += losses[:, -LAST:].mean(1).tolist()
            values["kl"] += [c.kl for c in compared]
            values["top1"] += [c.top1 for c in compared]
        return {**values, **_prefills(prefills)}


class InsideCell:
    """Where the time of a prefill goes, and what the heads of a layer keep in common, on passages of the reference text."""

    def __init__(self, runner: Runner, prompter: Prompter, length: int, samples: int, batch: int) -> None:
        count = max(2, min(samples, batch))  # one row alone would be traced anew
        self._runner, self._ids = runner, _tensor([prompter.text(length, i, samples) for i in range(count)], runner)

    def measure(self, plan: Plan | None) -> Values:
        overlap = head_overlap(self._runner, self._ids[:2], plan) if plan else {}
        return {"time": time_split(self._runner, self._ids, plan), "overlap": overlap}


def _tensor(ids: list[list[int]], runner: Runner) -> Tensor:
    return torch.tensor(ids, device=runner.device)


def _tasks(task: str, samples: int) -> list[Task]:
    seeds = range(samples)
    if task == NEEDLE:
        return [tasks.needle(random.Random(f"{task}/{seed}"), depth) for depth in DEPTHS for seed in seeds]
    return [GENERATORS[task](random.Random(f"{task}/{seed}")) for seed in seeds]


def _scored(results: Sequence[tuple[float, float]], samples: int) -> Values:
    """Means over all, and by group of `samples`: the depths of a needle."""
    scores = [s for s, _ in results]
    groups = [_mean(scores[i : i + samples]) for i in range(0, len(scores), samples)]
    return {"score": _mean(scores), "groups": groups, "scores": scores, "answer_nll": _mean([loss for _, loss in results])}


def _prefills(runs: list[tuple[float, int, dict[int, float]]]) -> Values:
    """Seconds a sample, of the fastest batch; mean kept share by layer."""
    layers = runs[0][2]
    kept = {str(layer): _mean([r[2][layer] for r in runs]) for layer in layers}
    return {"seconds": min(s / n for s, n, _ in runs), "batch": max(n for _, n, _ in runs), "kept": kept}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
