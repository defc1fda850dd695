"""Train a block-diffusion model of a few million parameters on recall in prose, and measure what remembered keys cost it.

Made for one GPU and some ten minutes. Weights stay in the folder that is named; what comes out for people is JSON and a page.
"""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tsa_compile.policies.remembered import Remembered
from tsa_compile.tools import plots
from tsa_compile.tools.bench.prompts import essay
from tsa_compile.tools.diffusion.model import Sizes
from tsa_compile.tools.diffusion.recall_task import RecallTask
from tsa_compile.tools.diffusion.train import Outcome, evaluate, train

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Sizes and lengths; the defaults are some five million parameters and prefixes of 1,024 tokens."""

    keys: int = 32
    values: int = 16
    questions: int = 16
    prefix: int = 1024
    width: int = 256
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    mlp: int = 768
    steps: int = 2500
    batch: int = 32
    rate: float = 1e-3
    remembered: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    dense_layers: int = 2
    threshold: float = 0.9
    rows: int = 200
    seed: int = 0

    @property
    def task(self) -> RecallTask:
        return RecallTask(self.keys, self.values, self.questions, self.prefix, fillers=256)

    @property
    def sizes(self) -> Sizes:
        return self.task.sizes(width=self.width, layers=self.layers, heads=self.heads, kv_heads=self.kv_heads, mlp=self.mlp)


def run(
    experiment: Experiment,
    out: Path,
    device: str,
    seconds: float | None = None,
    told: Callable[[int, int, float], None] | None = None,
) -> dict[str, dict[str, Outcome]]:
    """Train, measure, and write `model.pt`, `results.json` and `report.html` to the folder `out`.

    Returns:
        Outcomes by plan, under "fixed" (one answer a step) and "adaptive" (by the confidence threshold).
    """
    e, text = experiment, prose(experiment.prefix)
    model = train(e.task, e.sizes, e.steps, e.batch, e.rate, e.seed, device, text, seconds, told)
    dense = e.dense_layers
    plans: dict[str, Remembered | None] = {"dense": None}
    plans |= {f"k {k}": Remembered("denoise_first", keys=k, dense_layers=dense) for k in e.remembered}
    plans["k 64, 5 queries"] = Remembered("denoise_first", keys=64, dense_layers=dense, queries=5)
    found = {
        name: evaluate(model, e.task, plans, e.rows, e.seed + 1, text, threshold)
        for name, threshold in (("fixed", None), ("adaptive", e.threshold))
    }
    out.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), out / "model.pt")
    parameters = sum(p.numel() for p in model.parameters())
    head = {"experiment": dataclasses.asdict(e), "parameters": parameters, "torch": torch.__version__, "device": _name(device)}
    results = {loop: {plan: dataclasses.asdict(o) for plan, o in outcomes.items()} for loop, outcomes in found.items()}
    (out / "results.json").write_text(json.dumps({**head, "results": results}, indent=1) + "\n")
    (out / "report.html").write_text(page(e, found, head))
    return found


def prose(prefix: int) -> Tensor:
    """Bytes of generated prose, enough for many different prefixes."""
    written = essay(max(40_000, 8 * prefix), seed=0).encode("ascii", "replace")
    return torch.frombuffer(bytearray(written), dtype=torch.uint8).long()


def lines(outcomes: Mapping[str, Outcome]) -> list[str]:
    """One line a plan: answers, forwards, and how much of the exact attention the lists held."""
    shown = []
    for name, o in outcomes.items():
        held = "" if o.mass is None or o.overlap is None else f", mass {o.mass:.1%}, overlap {o.overlap:.1%}"
        dense = f", lists never bite in {o.never_bit:.0%} of the blocks" if o.mass is not None else ""
        shown.append(f"{name:18} right {o.right:.1%}, later steps {o.later:.1%}, {o.forwards:.2f} forwards{held}{dense}")
    return shown


def page(experiment: Experiment, found: Mapping[str, Mapping[str, Outcome]], head: Mapping[str, Any]) -> str:
    """Answers, mass and overlap against the number of remembered keys, and all lines."""
    fixed = found["fixed"]
    sizes = [k for k in experiment.remembered if f"k {k}" in fixed]
    curves = {
        "right answers": _points(fixed, sizes, "right"),
        "of later steps": _points(fixed, sizes, "later"),
        "mass": _points(fixed, sizes, "mass"),
        "overlap": _points(fixed, sizes, "overlap"),
    }
    told = "".join(f"<h2>{html.escape(loop)}</h2><pre>{html.escape(chr(10).join(lines(o)))}</pre>" for loop, o in found.items())
    about = f"{head['parameters']:,} parameters, prefix {experiment.prefix} tokens, {head['device']}, torch {head['torch']}"
    plot = plots.curves(curves, "remembered keys", "share", "log2", "linear")
    body = f"<h1>Remembered keys on recall</h1><p>{html.escape(about)}</p>{plots.legend(list(curves))}{plot}{told}"
    return f"<!doctype html><meta charset=utf-8><style>{plots.STYLE}</style>{body}\n"


def _points(outcomes: Mapping[str, Outcome], sizes: Sequence[int], field: str) -> list[plots.Point]:
    values = [(k, getattr(outcomes[f"k {k}"], field)) for k in sizes]
    return [(k, value, f"k {k}: {value:.1%}") for k, value in values if value is not None]


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"
