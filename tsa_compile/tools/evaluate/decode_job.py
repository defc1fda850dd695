"""`tsa-compile eval --decode`: decode policies beside one another on one model; cells are resumable, the time may be bounded."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tsa_compile.plan import Plan
from tsa_compile.progress import told
from tsa_compile.tools.evaluate.cells import TEXT
from tsa_compile.tools.evaluate.decode_cells import StepsCell, TextCell
from tsa_compile.tools.evaluate.decode_runner import DecodeRunner
from tsa_compile.tools.evaluate.decode_summary import STEPS
from tsa_compile.tools.evaluate.decode_tasks import OWN, TaskCell, own_prompts
from tsa_compile.tools.evaluate.decode_variants import FAMILIES, KEEP, decode_variants
from tsa_compile.tools.evaluate.prompter import Prompter
from tsa_compile.tools.evaluate.ruler_data import TASKS as RULER
from tsa_compile.tools.evaluate.setting import check_lengths, setting
from tsa_compile.tools.evaluate.store import Store
from tsa_compile.tools.evaluate.variants import Variant, own_variant

FITTED_ON = ("multi_key", "variable_tracking")  # prompts of these, other ones than those that are measured
FITTED_SEED, FITTED_PROMPTS = 10_000, 2


@dataclasses.dataclass(frozen=True)
class DecodeOptions:
    """What to compare.

    Args:
        model: its name, for the report.
        lengths: tokens of a prompt, its answer included.
        samples: texts, and prompts of a task.
        tasks: some of "text", "steps", `decode_tasks.OWN` and RULER's (`ruler_data.TASKS`).
        families: of `decode_variants.FAMILIES`, beside dense.
        keep: shares of the pages that are read.
        policies: JSON files of policies or plans to compare beside them.
        last: tokens at the end of a text that are decoded.
        batches: requests whose steps are timed.
        batch_tokens: tokens that run at a time, at most.
        minutes: no cell is begun after so many; a later call goes on. None: all are measured.
    """

    model: str
    lengths: tuple[int, ...]
    samples: int = 8
    tasks: tuple[str, ...] = (TEXT, "steps", *OWN)
    families: tuple[str, ...] = tuple(FAMILIES)
    keep: tuple[float, ...] = KEEP
    policies: tuple[str, ...] = ()
    last: int = 64
    batches: tuple[int, ...] = (1, 8)
    batch_tokens: int = 163_840
    minutes: float | None = None

    def __post_init__(self) -> None:
        known = (TEXT, "steps", *OWN, *RULER)
        for what, given, allowed in (("task", self.tasks, known), ("family", self.families, tuple(FAMILIES))):
            unknown = sorted(set(given) - set(allowed))
            if unknown:
                raise ValueError(f"unknown {what} {unknown[0]!r} of decode; known: {', '.join(allowed)}")
        if not self.lengths or min(self.lengths) < max(256, 2 * self.last):
            raise ValueError(f"lengths must be {max(256, 2 * self.last)} tokens or more, got {list(self.lengths)}")
        one = {"last": (self.last,), "samples": (self.samples,)}
        for name, numbers in {"keep": self.keep, "batches": self.batches, **one}.items():
            if not all(n > 0 for n in numbers):
                raise ValueError(f"{name} must be above 0, got {numbers}")

    def cells(self) -> list[str]:
        """Task names in the order in which they are measured: closeness, times, answers."""
        steps = [f"{STEPS}{n}" for n in self.batches] if "steps" in self.tasks else []
        return [t for t in (TEXT,) if t in self.tasks] + steps + [t for t in (*OWN, *RULER) if t in self.tasks]


def run(options: DecodeOptions, model: Any, tokenizer: Any, folder: str | Path, console: Console) -> dict[str, Any]:
    """Fill `folder`/results.json and return its content; what is there already is not measured again.

    Raises:
        ValueError: the file holds results of another setting, or a prompt is longer than the model's positions.
    """
    check_lengths(options.lengths, model)
    given = setting(options.model, options.samples, model) | {"phase": "decode", "last": options.last}
    store = Store(Path(folder) / "results.json", given)
    runner, prompter = DecodeRunner(model), Prompter(tokenizer)
    variants = _variants(options, runner, prompter, store)
    store.data["model"] = _sizes(runner)
    store.save()
    end = math.inf if options.minutes is None else time.monotonic() + 60 * options.minutes
    plan = [(length, task) for task in options.cells() for length in options.lengths]
    with told(len(plan) * len(variants), console) as advance:
        for length, task in plan:
            make = functools.cache(partial(_cell, task, options, runner, prompter, length, Path(folder)))
            if not _measure(store, make, length, task, variants, end, advance):
                console.print(f"{options.minutes:g} minutes are over: the same call goes on from here", markup=False)
                break
    return store.data


def _measure(
    store: Store, make: Callable[[], Any], length: int, task: str, variants: Sequence[Variant], end: float,
    advance: Callable[[str], None],
) -> bool:  # fmt: skip
    """The variants of one task and length that are not measured yet; false: the time is over."""
    for variant in variants:
        if not store.has(length, task, variant.name):
            if time.monotonic() > end:
                return False
            start = time.perf_counter()
            assert variant.plan is not None
            values = make().measure(variant.plan)
            store.add(length, task, variant.name, {**values, "elapsed": time.perf_counter() - start})
        advance(f"{length} tokens, {task}, {variant.name}")
    return True


def _cell(task: str, options: DecodeOptions, runner: DecodeRunner, prompter: Prompter, length: int, folder: Path) -> Any:
    batch = max(1, options.batch_tokens // length)
    if task == TEXT:
        return TextCell(runner, prompter, length, options.samples, batch, options.last)
    if task.startswith(STEPS):
        return StepsCell(runner, prompter, length, int(task.removeprefix(STEPS)))
    return TaskCell(task, folder / "ruler", runner, prompter, length, options.samples, batch)


def _variants(options: DecodeOptions, runner: DecodeRunner, prompter: Prompter, store: Store) -> list[Variant]:
    """The policies that are compared; fitted plans come from the results where they are there."""
    known = {v["name"]: Plan.from_dict(v["plan"]) for v in store.data.get("variants", [])}
    shortest = min(options.lengths)

    @functools.cache
    def texts() -> list[torch.Tensor]:
        return list(_fitted_on(prompter, shortest, runner.device))

    variants = decode_variants(runner.model, options.families, options.keep, texts, shortest, known)
    own = [own_variant(path) for path in options.policies]
    for variant in own:
        if variant.plan is None or not variant.plan.decodes:
            raise ValueError(f"{variant.name}: the plan has no policy for decode steps")
    store.add_variants([*variants, *own])
    return [*variants, *own]


def _fitted_on(prompter: Prompter, length: int, device: torch.device) -> Iterator[torch.Tensor]:
    for task in FITTED_ON:
        for prompt in own_prompts(task, prompter, length, FITTED_PROMPTS, FITTED_SEED):
            yield torch.tensor([prompt.ids], device=device)


def _sizes(runner: DecodeRunner) -> dict[str, Any]:
    config = runner.model.config.get_text_config()
    return {
        "layers": int(config.num_hidden_layers), "heads": int(config.num_attention_heads),
        "kv_heads": int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads),
        "parameters": sum(p.numel() for p in runner.model.parameters()),
    }  # fmt: skip
