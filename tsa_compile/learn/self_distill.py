"""A model learns to decode sparsely as it does densely: RTPurbo's second stage (arXiv 2605.16928), here by LoRA weights.

Teacher and student are one model: dense, with the adapter off, and under the plan, with it on. The loss is KL(teacher || student)
at the last tokens of each text, which the student reads as decode steps: over the teacher's likeliest tokens, and all others as
if they were one. A text's teacher is asked when the text is read, and nothing of it is kept; indexes stay as they are. Published:
about 600 steps on all weights, the ten likeliest tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tsa_compile.index_weights import attach_indexes, check_indexes, load_indexes
from tsa_compile.learn.distillation import Distillation, Learner
from tsa_compile.learn.indexer_settings import schedule
from tsa_compile.learn.indexer_state import TrainingState
from tsa_compile.learn.model_inputs import fingerprint, held_back
from tsa_compile.learn.text_decoder import texts_of
from tsa_compile.plan import Plan

Tensor = torch.Tensor


def distill(
    model: nn.Module,
    prompts: Iterable[Any],
    plan: Plan,
    out: str | Path,
    recipe: Distillation | None = None,
    *,
    held_out: int = 0,
    state: str | Path | None = None,
    progress: bool = True,
) -> Plan:
    """The plan, saved at `out`, and beside it a PEFT adapter (`out` with ".adapter") for a model that decodes under it.

    To use both: `tsa.transform(peft.PeftModel.from_pretrained(model, folder), plan)`, or first merge the adapter into the model.
    The model's dense answers with the adapter are not those without.

    Args:
        model: a decoder of transformers in evaluation mode; it is left as it was. On a text it takes the memory of training.
        prompts: token ids, one unpadded text an entry, longer than `recipe.steps`.
        plan: decode steps by `HeadSplit`, `PageSparse` or `Exact`, prefill by `Dense` or `HeadSplit`.
        out: a JSON file.
        recipe: how; None: as `Distillation()` says.
        held_out: last texts that are not trained on; the plan's notes have their KL without the adapter and with it.
        state: a file; an interrupted call goes on from it, with the same result.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: an argument is wrong, a policy is none of those, or the model has adapters already.
    """
    recipe = Distillation() if recipe is None else recipe
    vocabulary = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    if recipe.likeliest >= vocabulary:
        raise ValueError(f"Distillation.likeliest must be below the vocabulary's {vocabulary}, got {recipe.likeliest}")
    texts, folder = texts_of(model, prompts, recipe.steps), Path(out).with_suffix(".adapter")
    own, held = held_back(texts, held_out)
    with _learner(model, own, plan, recipe) as (learner, key):
        done = TrainingState(state, key, {"adapter": learner})
        _train(learner, own, recipe, done, progress)
        measured = learner.measured(held)
        learner.adapter.save(folder)
    told = {**dataclasses.asdict(recipe), "targets": list(recipe.targets), "texts": len(own), "held out": measured}
    told |= {"KL of each text": [round(x, 4) for x in done.losses]}
    made = {"made by": "tsa_compile.learn.self_distill", "folder": folder.name, **told}
    distilled = dataclasses.replace(plan, notes={**plan.notes, "adapter": made})
    distilled.save(out)
    return distilled


@contextlib.contextmanager
def _learner(
    model: nn.Module, texts: Sequence[Tensor], plan: Plan, recipe: Distillation
) -> Iterator[tuple[Learner, dict[str, Any]]]:
    """Inside, the plan's indexes and an adapter are in the model; what a training with it depends on stands beside."""
    remove = attach_indexes(model, {} if plan.weights is None else load_indexes(plan.weights))
    try:
        bound = plan.bind(model)
        check_indexes(model, bound)
        rules = bound.to_dict() | {"weights": None, "notes": {}}  # the index's numbers are in the fingerprint
        told = {"prompts and model": fingerprint(model, [{"input_ids": x} for x in texts]), "plan": rules}
        learner = Learner(model, bound, recipe)
        try:
            yield learner, {**told, **dataclasses.asdict(recipe)}
        finally:
            learner.adapter.remove()
    finally:
        remove()


def _train(learner: Learner, texts: Sequence[Tensor], recipe: Distillation, state: TrainingState, progress: bool) -> None:
    """An update for each reading of a text."""
    updates = recipe.epochs * len(texts)
    works = [
        functools.partial(learner.update, texts[n % len(texts)], recipe.lr * schedule((n + 1) / updates)) for n in range(updates)
    ]
    state.run(works, "self-distillation: KL", progress)
