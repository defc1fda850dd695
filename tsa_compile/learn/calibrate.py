"""`calibrate`: which layers become sparse, and how sparse, chosen on the user's own prompts.

The paper (arXiv 2602.03216) takes the half of the layers with the lowest drift. Here the loss decides: each layer alone, at each
coverage, says what a step costs and what it drops; steps are taken from the cheapest on; and how many of them the target allows
is measured on the whole model, never added up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tsa_compile.learn import search
from tsa_compile.learn.measurements import Run
from tsa_compile.learn.meter import Meter, Sample
from tsa_compile.learn.model_inputs import as_inputs, fingerprint
from tsa_compile.learn.search import Step
from tsa_compile.learn.state import Measured
from tsa_compile.learn.target import Target
from tsa_compile.plan import Plan
from tsa_compile.policies.token_sparse import TokenSparse
from tsa_compile.progress import Advance, Start
from tsa_compile.progress import progress as progress_bar

METHODS = ("loss", "drift")
COVERAGES = (0.02, 0.1, 0.2)


def calibrate(
    model: nn.Module,
    prompts: Iterable[Any],
    target: str = "kl<=0.01",
    *,
    policy: TokenSparse | None = None,
    coverages: Iterable[float] = COVERAGES,
    method: str = "loss",
    last: int = 128,
    state: str | Path | None = None,
    progress: bool = True,
) -> Plan:
    """A plan that meets `target` on `prompts`: as sparse as the loss allows, or as true as the sparsity allows.

    The model runs layers x coverages + about ten times on each prompt, one prompt at a time; no candidate is traced anew. It is
    left as it was. `docs/calibration.md` has the method and an example.

    Args:
        model: any module in evaluation mode whose output is logits `[1, L, vocabulary]` or has them as `.logits`.
        prompts: token ids or keyword arguments with `input_ids`, one unpadded prompt an entry, longer than
            `policy.min_tokens + policy.window` tokens. Take your own, as long as in use.
        target: "kl<=X": mean KL(dense || sparse) of the last predictions, in nats; "sparsity>=X": mean share of tokens that
            the layers do not keep, over all layers that can be sparse.
        policy: what a sparse layer gets, but for its coverage; None: `TokenSparse()`.
        coverages: what a layer may get, each in (0, 1).
        method: "loss": the order of steps that single layers' losses give; "drift": the paper's order, with far fewer runs.
        last: predictions at the end of each prompt that are compared.
        state: a JSON file; what is measured goes there, and an interrupted call goes on from it, with the same result.
        progress: show a progress bar on stderr.

    Returns:
        A plan: Dense but for the layers named. Its `notes` say what it was accepted at.

    Raises:
        ValueError: an argument is wrong, no site takes the policy, or no plan meets the target; the message says which, and how
            near it came.
        RuntimeError: the model is transformed, or part of it ran untraced.
    """
    goal = Target.parse(target)
    base = TokenSparse() if policy is None else policy
    ladder = tuple(sorted({float(c) for c in coverages}))
    _check(model, base, ladder, method, last)
    inputs = as_inputs(model, prompts, last, base.min_tokens + base.window)
    key = {
        "prompts and model": fingerprint(model, inputs), "policy": _without_coverage(base), "last": last,
        "versions": _versions(model),
    }  # fmt: skip
    measured = Measured(state, key)
    meter = Meter(model, base, last)
    run = Run(meter, inputs, measured, base)
    with progress_bar(show=progress) as start:
        layers = meter.find_layers(inputs[0])
        steps = _order(run, layers, ladder, method, start)
        n, sample = _search(run, goal, steps, start)
    return _plan(run, goal, steps[:n], sample, method, layers)


def _check(model: nn.Module, base: Any, ladder: tuple[float, ...], method: str, last: int) -> None:
    if not isinstance(base, TokenSparse):
        raise ValueError(f"policy must be a TokenSparse, got {base!r}")
    if not ladder or not all(0 < c < 1 for c in ladder):
        raise ValueError(f"coverages must be numbers in (0, 1), got {ladder}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if last < 1:
        raise ValueError(f"last must be at least 1, got {last}")
    if model.training:
        raise ValueError("the model is in training mode, where dropout hides what is measured; call model.eval() first")
    if model._compiled_call_impl is not None:
        raise RuntimeError("the model is transformed or compiled; call tsa_compile.restore(model) before calibrating it")


def _order(run: Run, layers: list[str], ladder: tuple[float, ...], method: str, start: Start) -> list[Step]:
    if method == "drift":
        drift = run.drift()
        if set(drift) != set(layers):
            raise ValueError(f"method 'drift': no drift is known of layers {sorted(set(layers) - set(drift))}; use 'loss'")
        return search.drift_order(drift, ladder)
    steps = [Step(layer, c) for layer in layers for c in ladder]
    alone = run.alone(steps, start("each layer alone", len(steps) * len(run.inputs)))
    return search.greedy_order(alone)


def _search(run: Run, goal: Target, steps: list[Step], start: Start) -> tuple[int, Sample]:
    """(steps taken, what the plan was measured at): a plan that meets the goal when it runs as `transform` runs it."""
    advance = start("whole plans", (len(steps).bit_length() + 2) * len(run.inputs))

    def met(n: int) -> bool:
        sample = run.whole(search.coverage_of(steps[:n]), advance)
        return goal.met_by(sample.kl, sample.sparsity)

    if goal.quantity == "kl":
        n = len(steps) if steps and met(len(steps)) else search.first_where(lambda n: not met(n), 0, len(steps)) - 1
        further = range(n, 0, -1)  # tighten: one step fewer
    else:
        n = search.first_where(met, 0, len(steps)) if steps else 0
        further = range(max(n, 1), len(steps) + 1)
    for n in further:
        sample = run.whole(search.coverage_of(steps[:n]), advance)
        if goal.met_by(sample.kl, sample.sparsity):
            return n, sample
    raise ValueError(_impossible(run, goal, steps, advance))


def _impossible(run: Run, goal: Target, steps: list[Step], advance: Advance) -> str:
    if not steps:
        return f"target {str(goal)!r} cannot be met: no layer drops a token at any of the coverages; give larger coverages"
    nearest = steps[:1] if goal.quantity == "kl" else steps
    sample = run.whole(search.coverage_of(nearest), advance)
    what = "with a single layer sparse" if goal.quantity == "kl" else "with all layers at their largest coverage"
    return f"target {str(goal)!r} cannot be met: {what} kl is {sample.kl:.6f} and sparsity {sample.sparsity:.4f}"


def _plan(run: Run, goal: Target, steps: list[Step], sample: Sample, method: str, layers: list[str]) -> Plan:
    """The plan with its notes."""
    meter, inputs = run.meter, run.inputs
    notes = {
        "made by": "tsa_compile.calibrate",
        "target": str(goal),
        "measured": {"kl": sample.kl, "same top token": sample.top1, "sparsity": sample.sparsity},
        "predictions compared": run.measured.key["last"],
        "prompts": len(inputs),
        "prompt tokens": [given["input_ids"].shape[1] for given in inputs],
        "sparse layers": f"{len({s.layer for s in steps})} of {len(layers)}",
        "dense whatever the plan": meter.always_dense,
        "order of layers": method,
        "drift": run.drift(),
        "versions": run.measured.key["versions"],
    }
    return dataclasses.replace(run.plan(search.coverage_of(steps)), notes=notes)


def _without_coverage(base: TokenSparse) -> dict[str, Any]:
    fields = base.to_dict()
    del fields["coverage"]
    return fields


def _versions(model: nn.Module) -> dict[str, str]:
    from tsa_compile import __version__

    parameter = next(model.parameters())
    device = torch.cuda.get_device_name(parameter.device) if parameter.is_cuda else parameter.device.type
    return {
        "model": type(model).__name__, "device": device, "dtype": str(parameter.dtype).removeprefix("torch."),
        "torch": torch.__version__, "tsa_compile": __version__,
    }  # fmt: skip
