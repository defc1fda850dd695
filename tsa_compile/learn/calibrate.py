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

from torch import nn

from tsa_compile.learn import search
from tsa_compile.learn.calibrate_blocks import ALPHAS, calibrate_blocks
from tsa_compile.learn.calibrate_pages import KEEPS, calibrate_pages
from tsa_compile.learn.measurements import Run
from tsa_compile.learn.meter import Meter, Sample
from tsa_compile.learn.model_inputs import as_inputs, fingerprint, versions
from tsa_compile.learn.search import Step
from tsa_compile.learn.state import Measured
from tsa_compile.learn.target import Target
from tsa_compile.plan import Plan
from tsa_compile.policies.block_sparse import BlockSparse
from tsa_compile.policies.page_sparse import PageSparse
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
    policy: TokenSparse | BlockSparse | PageSparse | None = None,
    coverages: Iterable[float] | None = None,
    alphas: Iterable[float] | None = None,
    keeps: Iterable[float] | None = None,
    method: str = "loss",
    last: int = 128,
    state: str | Path | None = None,
    progress: bool = True,
) -> Plan:
    """A plan that meets `target` on `prompts`: as sparse as the loss allows, or as true as the sparsity allows.

    The model runs layers x coverages + about ten times on each prompt, one prompt at a time; with `BlockSparse` two times the
    layers + about twenty; with `PageSparse`, which is for decode, the layers + about twenty times the end of each text. No
    candidate is traced anew. It is left as it was. `docs/calibration.md` has the methods and examples.

    Args:
        model: any module in evaluation mode whose output is logits `[1, L, vocabulary]` or has them as `.logits`.
        prompts: token ids or keyword arguments with `input_ids`, one unpadded prompt an entry, longer than
            `policy.min_tokens + policy.window` tokens. Take your own, as long as in use.
        target: "kl<=X": mean KL(dense || sparse) of the compared predictions, in nats. For `TokenSparse` "sparsity>=X": mean
            share of tokens that the layers do not keep, over all layers that can be sparse. For `BlockSparse` "pairs<=X": mean
            share of the causal query-key pairs that these layers read. For `PageSparse` "pages<=X": mean share of the cache's
            pages that a decode step reads.
        policy: what a sparse layer gets, but for its coverage, alpha or keep; None: `TokenSparse()`.
        coverages: `TokenSparse`: what a layer may get, each in (0, 1); None: `COVERAGES`.
        alphas: `BlockSparse`: what a query head may get, each in (0, 1); None: `calibrate_blocks.ALPHAS`.
        keeps: `PageSparse`: what a KV head may get, each in (0, 1]; None: `calibrate_pages.KEEPS`.
        method: "loss": by what the loss says of single layers. With far fewer runs, for `TokenSparse` "drift": the paper's order;
            for `BlockSparse` and `PageSparse` "error": by the errors of heads alone, and "one": one number for all.
        last: predictions at the end of each prompt that are compared; for `BlockSparse` those at the end of the rows that are not
            dense, and as many in the middle; for `PageSparse` the tokens that are decoded.
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
    _check_model(model, last)
    if isinstance(base, PageSparse):
        _refuse_other("coverages", coverages, base)
        _refuse_other("alphas", alphas, base)
        return calibrate_pages(model, prompts, goal, base, KEEPS if keeps is None else keeps, method, last, state, progress)
    _refuse_other("keeps", keeps, base)
    if isinstance(base, BlockSparse):
        _refuse_other("coverages", coverages, base)
        tried = ALPHAS if alphas is None else alphas
        return calibrate_blocks(model, prompts, goal, base, tried, method, last, state, progress)
    _refuse_other("alphas", alphas, base)
    ladder = tuple(sorted({float(c) for c in (COVERAGES if coverages is None else coverages)}))
    _check(goal, base, ladder, method)
    inputs = as_inputs(model, prompts, last, base.min_tokens + base.window)
    key = {
        "prompts and model": fingerprint(model, inputs), "policy": _without_coverage(base), "last": last,
        "versions": versions(model),
    }  # fmt: skip
    measured = Measured(state, key)
    meter = Meter(model, base, last)
    run = Run(meter, inputs, measured, base)
    with progress_bar(show=progress) as start:
        layers = meter.find_layers(inputs[0])
        steps = _order(run, layers, ladder, method, start)
        n, sample = _search(run, goal, steps, start)
    return _plan(run, goal, steps[:n], sample, method, layers)


def _check(goal: Target, base: Any, ladder: tuple[float, ...], method: str) -> None:
    if not isinstance(base, TokenSparse):
        raise ValueError(f"policy must be a TokenSparse, a BlockSparse or a PageSparse, got {base!r}")
    if goal.quantity in ("pairs", "pages"):
        raise ValueError(f'target must be "kl<=X" or "sparsity>=X" for TokenSparse, got {str(goal)!r}')
    if not ladder or not all(0 < c < 1 for c in ladder):
        raise ValueError(f"coverages must be numbers in (0, 1), got {ladder}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS} for TokenSparse, got {method!r}")


def _refuse_other(name: str, given: Any, base: Any) -> None:
    if given is not None:
        raise ValueError(f"{name} must be None for {type(base).__name__}, which has none, got {given!r}")


def _check_model(model: nn.Module, last: int) -> None:
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
