"""Thresholds of `BlockSparse` by layer and head that meet a target: several ways to spread the pairs, the best as measured."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping

from tsa_compile.learn.block_meter import BlockSample
from tsa_compile.learn.block_run import BlockRun
from tsa_compile.learn.block_tables import ByLayer, Tables
from tsa_compile.learn.layer_costs import weights
from tsa_compile.learn.target import Target
from tsa_compile.progress import Advance, Start

ONE, HEADS, LAYERS, CONTEXT = "one alpha", "by head", "by head and layer", "by head and layer, in context"
METHODS = {"one": 1, "error": 2, "loss": 4}  # how many of these ways are tried
TRIES = 6  # to come within NEAR of a share of the pairs, from below
NEAR = 0.99
STEPS = 7  # of the bisection for a loss
Form = Callable[[float], ByLayer]  # from the share of the pairs that dense runs would read


@dataclasses.dataclass(frozen=True)
class Found:
    """The plan's alphas by layer, what it was measured at, and what every way that was tried was measured at, at equal pairs."""

    form: str
    alphas: ByLayer
    sample: BlockSample
    tried: Mapping[str, BlockSample]


def search(run: BlockRun, tables: Tables, goal: Target, method: str, base: ByLayer, start: Start) -> Found:
    """Alphas that meet the goal: so many pairs at most, with the least loss; or so much loss at most, with the fewest pairs.

    Args:
        tables: of the run's prompts.
        method: a key of METHODS.
        base: if the goal is a loss, ways are compared at as many pairs as these alphas read.

    Raises:
        ValueError: nothing that was tried meets the goal; the message says how near it came.
    """
    advance = start("whole plans", (METHODS[method] * TRIES + STEPS) * len(run.inputs))
    share = goal.bound if goal.quantity == "pairs" else run.sample(base, advance).pairs
    alphas, sample = _within(run, tables.one, share, advance)
    found: dict[str, tuple[Form, ByLayer, BlockSample]] = {ONE: (tables.one, alphas, sample)}
    form: Form
    for name, weight in _ways(run, tables, method, alphas, sample, start):
        weighed = functools.partial(tables.fit, weight=weight)
        found[name] = weighed, *_within(run, weighed, share, advance)
    best = min(found, key=lambda name: found[name][2].loss)
    form, alphas, sample = found[best]
    if goal.quantity == "kl":
        alphas, sample = _fewest(run, form, tables, goal, advance)
    return Found(best, alphas, sample, {name: measured for name, (_, _, measured) in found.items()})


def _ways(
    run: BlockRun, tables: Tables, method: str, alphas: ByLayer, sample: BlockSample, start: Start
) -> Iterator[tuple[str, Mapping[str, float] | None]]:
    """Name and weights of the layers of each way to spread pairs by error; `alphas` and `sample`: of one alpha for all."""
    if METHODS[method] >= 2:
        yield HEADS, None
    if METHODS[method] >= 4:
        errors = tables.errors_at(alphas)
        yield LAYERS, weights(run.alone(alphas, start), errors)
        yield CONTEXT, weights(run.in_context(alphas, sample.loss, start), errors)


def _within(run: BlockRun, form: Form, share: float, advance: Advance) -> tuple[ByLayer, BlockSample]:
    """The alphas of a form that read the most pairs, `share` at most, as measured on the whole model."""
    low, want, high = 0.0, share, math.inf  # what is asked of the form: what reads little enough, the next, what reads too much
    best: tuple[ByLayer, BlockSample] | None = None
    for n in range(TRIES):
        alphas = form(0.0 if best is None and n == TRIES - 1 else want)
        sample = run.sample(alphas, advance)
        if sample.pairs > share:
            high = want
        elif best is None or sample.pairs > best[1].pairs:
            low, best = want, (alphas, sample)
            if sample.pairs >= NEAR * share:
                break
        want += (1 + NEAR) / 2 * share - sample.pairs
        if not low < want < high:
            want = (low + high) / 2 if high < math.inf else 2 * low
    if best is None:
        raise ValueError(
            f"target 'pairs<={share:g}' cannot be met: {sample.pairs:.4f} of the pairs are read where the fewest are"
        )
    return best


def _fewest(run: BlockRun, form: Form, tables: Tables, goal: Target, advance: Advance) -> tuple[ByLayer, BlockSample]:
    """The alphas of a form that meet a bound on the loss with the fewest pairs, by bisection."""
    low, high = (float(tables.read[n].sum()) for n in (0, -1))
    for share in (low, high):
        alphas = form(share)
        best = alphas, run.sample(alphas, advance)
        if best[1].loss <= goal.bound:
            break
    else:
        at = f"kl is {best[1].loss:.6f} with alpha {tables.alphas[-1]:g}, where {best[1].pairs:.4f} of the pairs are read"
        raise ValueError(f"target {str(goal)!r} cannot be met: {at}")
    for _ in range(STEPS if share == high else 0):
        middle = math.sqrt(low * high)
        alphas = form(middle)
        sample = run.sample(alphas, advance)
        if sample.loss <= goal.bound:
            best, high = (alphas, sample), middle
        else:
            low = middle
    return best
