"""`tsa-compile eval`: every cell of a model, resumable, with a progress bar."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tsa_compile.progress import told
from tsa_compile.tools.evaluate.cells import INSIDE, TASKS, TEXT, InsideCell, RetrievalCell, TextCell
from tsa_compile.tools.evaluate.prompter import Prompter
from tsa_compile.tools.evaluate.ruler_cell import RulerCell
from tsa_compile.tools.evaluate.ruler_data import TASKS as RULER
from tsa_compile.tools.evaluate.runner import Runner
from tsa_compile.tools.evaluate.setting import check_lengths, setting
from tsa_compile.tools.evaluate.store import Store
from tsa_compile.tools.evaluate.variants import COVERAGES, FAMILIES, Variant, low_drift_half, own_variant, standard_variants


@dataclasses.dataclass(frozen=True)
class Options:
    """What to evaluate.

    Args:
        model: its name, for the report.
        lengths: tokens of a prompt, its answer included.
        samples: for each cell.
        tasks: some of `cells.TASKS` and of RULER's (`ruler_data.TASKS`).
        coverages: of the standard variants.
        families: of the standard variants beside dense, some of `variants.FAMILIES`.
        policies: JSON files of policies or plans to compare beside them.
        batch_tokens: tokens that run at a time, at most.
    """

    model: str
    lengths: tuple[int, ...]
    samples: int = 20
    tasks: tuple[str, ...] = TASKS
    coverages: tuple[float, ...] = COVERAGES
    families: tuple[str, ...] = tuple(FAMILIES)
    policies: tuple[str, ...] = ()
    batch_tokens: int = 163_840

    def __post_init__(self) -> None:
        for what, given, known in (("task", self.tasks, (*TASKS, *RULER)), ("family", self.families, FAMILIES)):
            unknown = sorted(set(given) - set(known))
            if unknown:
                raise ValueError(f"unknown {what} {unknown[0]!r}; known: {', '.join(known)}")
        if not self.lengths or min(self.lengths) < 256:
            raise ValueError(f"lengths must be 256 tokens or more, got {list(self.lengths)}")


def run(options: Options, model: Any, tokenizer: Any, folder: str | Path, console: Console) -> dict[str, Any]:
    """Fill `folder`/results.json and return its content; what is there already is not measured again.

    Raises:
        ValueError: the file holds results of another setting, or a prompt is longer than the model's positions.
    """
    check_lengths(options.lengths, model)
    runner, prompter = Runner(model), Prompter(tokenizer)
    store = Store(Path(folder) / "results.json", setting(options.model, options.samples, model))
    variants = _variants(options, runner, prompter, store)
    plan = [(n, t, _of_task(t, variants, options)) for n in options.lengths for t in (*TASKS, *RULER) if t in options.tasks]
    total = sum(len(chosen) for _, _, chosen in plan)
    with told(total, console) as advance:
        for length, task, chosen in plan:
            _measure(options, runner, prompter, store, chosen, length, task, Path(folder), advance)
    return store.data


def _of_task(task: str, variants: Sequence[Variant], options: Options) -> list[Variant]:
    """All variants; to look inside, those of the middle coverage."""
    middle = sorted(options.coverages)[len(options.coverages) // 2]
    return [v for v in variants if task != INSIDE or v.coverage in (None, middle)]


def _measure(
    options: Options, runner: Runner, prompter: Prompter, store: Store, variants: Sequence[Variant],
    length: int, task: str, folder: Path, advance: Callable[[str], None],
) -> None:  # fmt: skip
    """The variants of one task and length that are not measured yet."""
    cell: Any = None
    for variant in variants:
        if not store.has(length, task, variant.name):
            if cell is None:
                ours = partial(RulerCell, task, folder / "ruler") if task in RULER else partial(RetrievalCell, task)
                kind = {TEXT: TextCell, INSIDE: InsideCell}.get(task, ours)
                cell = kind(runner, prompter, length, options.samples, max(1, options.batch_tokens // length))
            start = time.perf_counter()
            values = cell.measure(variant.plan)
            store.add(length, task, variant.name, {**values, "elapsed": time.perf_counter() - start})
        advance(f"{length} tokens, {task}, {variant.name}")


def _variants(options: Options, runner: Runner, prompter: Prompter, store: Store) -> list[Variant]:
    """The standard ones and the user's own; what was found about the layers goes into the results."""
    ids = torch.tensor([prompter.text(min(options.lengths), 0, 1)] * 2, device=runner.device)
    paths = runner.find_layers(ids)  # a sliding window no shorter than the prompt would look causal
    layers = sorted(paths)
    if not layers:
        raise ValueError("no attention of this model can be sparse; see tsa-compile explain")
    half = low_drift_half(runner, paths, ids[:1])
    depth = int(runner.decoder.config.num_hidden_layers)
    own = [own_variant(p) for p in options.policies]
    variants = standard_variants(half, layers, depth, options.coverages, options.families) + own
    store.data["model"] = {"layers": layers, "depth": depth, "low_drift": half}
    store.add_variants(variants)
    return variants
