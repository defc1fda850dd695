"""`calibrate` for `BlockSparse`: an alpha for each query head of each layer, at the length of the user's own prompts.

One alpha spends pairs alike wherever they help; errors of early layers go through all later ones. So every head is measured at
every alpha along a dense run, layers are weighed by what the loss says, and pairs go where they lower the summed error most.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from tsa_compile.learn.block_meter import BlockMeter
from tsa_compile.learn.block_run import BlockRun
from tsa_compile.learn.block_search import METHODS, Found, search
from tsa_compile.learn.model_inputs import as_inputs, fingerprint, versions
from tsa_compile.learn.state import Measured
from tsa_compile.learn.target import Target
from tsa_compile.parallel import head_group
from tsa_compile.plan import Plan
from tsa_compile.policies.block_sparse import BlockSparse
from tsa_compile.policies.dense import Dense
from tsa_compile.progress import progress as progress_bar
from tsa_compile.rules import Rule

ALPHAS = (0.99, 0.7, 0.5, 0.35, 0.25, 0.18, 0.125, 0.09, 0.06, 0.04, 0.025, 0.015, 0.008, 0.003, 0.001)


def calibrate_blocks(
    model: nn.Module, prompts: Iterable[Any], goal: Target, policy: BlockSparse, alphas: Iterable[float], method: str, last: int,
    state: str | Path | None, progress: bool,
) -> Plan:  # fmt: skip
    """`calibrate` with a `BlockSparse`; arguments as there.

    Runs of each prompt: two, then with method "loss" two for each layer, then up to five for each way to spread the pairs.
    """
    tried = tuple(sorted({float(a) for a in alphas}, reverse=True))
    _check(model, goal, policy, tried, method)
    inputs = as_inputs(model, prompts, last, 0)
    meter = BlockMeter(model, policy, last)
    for given in inputs:
        meter.compared_rows(given["input_ids"].shape[1])
    key = {
        "prompts and model": fingerprint(model, inputs), "policy": _without_alpha(policy), "last": last,
        "versions": versions(model),
    }  # fmt: skip
    run = BlockRun(meter, inputs, Measured(state, key))
    with progress_bar(show=progress) as start:
        meter.find_layers(inputs[0])
        base = {layer: _for_heads(policy, heads) for layer, heads in zip(meter.layers, meter.heads, strict=True)}
        found = search(run, run.tables(tried, start), goal, method, base, start)
    return _plan(run, goal, policy, found)


def _check(model: nn.Module, goal: Target, policy: BlockSparse, alphas: tuple[float, ...], method: str) -> None:
    if goal.quantity in ("sparsity", "pages"):
        raise ValueError(f'target must be "kl<=X" or "pairs<=X" for BlockSparse, got {str(goal)!r}')
    if len(alphas) < 2 or not all(0 < a < 1 for a in alphas):
        raise ValueError(f"alphas must be two or more numbers in (0, 1), got {alphas}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {tuple(METHODS)} for BlockSparse, got {method!r}")
    if isinstance(policy.alpha, tuple):
        raise ValueError("policy.alpha must be one number: the calibration finds one for each head")
    if head_group(model) is not None:
        raise ValueError("the model's heads are spread over processes; calibrate BlockSparse on a model in one process")


def _for_heads(policy: BlockSparse, heads: int) -> tuple[float, ...]:
    assert not isinstance(policy.alpha, tuple)
    return (float(policy.alpha),) * heads


def _plan(run: BlockRun, goal: Target, policy: BlockSparse, found: Found) -> Plan:
    """The plan with its notes."""
    rules = [Rule(layer or "*", "prefill", dataclasses.replace(policy, alpha=_short(a))) for layer, a in found.alphas.items()]
    key, meter = run.measured.key, run.meter
    notes = {
        "made by": "tsa_compile.calibrate",
        "target": str(goal),
        "measured": dataclasses.asdict(found.sample),
        "alphas": found.form,
        "ways to spread as many pairs": {name: dataclasses.asdict(sample) for name, sample in found.tried.items()},
        "errors of heads": "in their layers' outputs" if meter.projected else "as they are: a layer's projection was not found",
        "predictions compared": f"{key['last']} at the end of the rows that are not dense, {key['last']} in the middle",
        "prompts": len(run.inputs),
        "prompt tokens": [given["input_ids"].shape[1] for given in run.inputs],
        "sparse layers": f"{len(rules)} of {len(rules)}",
        "dense whatever the plan": meter.always_dense,
        "versions": key["versions"],
    }
    return Plan(prefill=Dense(), rules=tuple(rules), notes=notes)


def _short(alphas: tuple[float, ...]) -> float | tuple[float, ...]:
    """One number if all are it."""
    return alphas[0] if len(set(alphas)) == 1 else alphas


def _without_alpha(policy: BlockSparse) -> dict[str, Any]:
    fields = policy.to_dict()
    del fields["alpha"]
    return fields
