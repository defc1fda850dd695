"""`calibrate` for `PageSparse`: how many pages each KV head of each layer reads in decode, on the user's own texts.

One share for all reads as many pages where heads look at a few tokens as where they look everywhere. So every KV head is measured
at every share along an exact run of decode steps, and pages go where they lower the summed error most, at the same bytes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tsa_compile.learn.layer_costs import weights
from tsa_compile.learn.model_inputs import fingerprint, versions
from tsa_compile.learn.page_meter import Keeps, PageMeter, PageSample
from tsa_compile.learn.page_run import PageRun, PageTables
from tsa_compile.learn.state import Measured
from tsa_compile.learn.target import Target
from tsa_compile.learn.text_decoder import texts_of
from tsa_compile.parallel import head_group
from tsa_compile.plan import Plan
from tsa_compile.policies.dense import Dense
from tsa_compile.policies.page_sparse import PageSparse
from tsa_compile.progress import Advance, Start
from tsa_compile.progress import progress as progress_bar
from tsa_compile.rules import Rule

KEEPS = (0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.35, 1.0)
ONE, HEADS, LAYERS = "one share", "by head", "by head and layer"
METHODS = {"one": 1, "error": 2, "loss": 3}  # how many of these ways to spread pages are tried
TRIES = 4  # to come within NEAR of a share of the pages, from below
NEAR = 0.98
STEPS = 6  # of the bisection for a loss
Form = Callable[[float], Mapping[str, tuple[float, ...]]]  # from a share of the pages


def calibrate_pages(
    model: nn.Module, prompts: Iterable[Any], goal: Target, policy: PageSparse, keeps: Iterable[float], method: str, last: int,
    state: str | Path | None, progress: bool,
) -> Plan:  # fmt: skip
    """`calibrate` with a `PageSparse`; arguments as there."""
    tried = tuple(sorted({float(k) for k in keeps}))
    _check(model, goal, policy, tried, method)
    texts = texts_of(model, prompts, last)
    given = [{"input_ids": ids} for ids in texts]
    fields = {name: value for name, value in policy.to_dict().items() if name != "keep"}
    key = {"prompts and model": fingerprint(model, given), "policy": fields, "last": last, "versions": versions(model)}
    run = PageRun(PageMeter(model, policy, last), texts, Measured(state, key))
    with progress_bar(show=progress) as start:
        run.meter.find_layers(texts[0])
        tables = run.tables(tried, start)
        found = _search(run, tables, goal, method, policy, start)
    return _accepted(run, goal, policy, *found)


def _check(model: nn.Module, goal: Target, policy: PageSparse, keeps: tuple[float, ...], method: str) -> None:
    if goal.quantity not in ("kl", "pages"):
        raise ValueError(f'target must be "kl<=X" or "pages<=X" for PageSparse, got {str(goal)!r}')
    if len(keeps) < 2 or not all(0 < k <= 1 for k in keeps):
        raise ValueError(f"keeps must be two or more numbers in (0, 1], got {keeps}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {tuple(METHODS)} for PageSparse, got {method!r}")
    if not isinstance(policy.keep, (int, float)):
        raise ValueError(f"policy must have one keep, as the calibration finds one for each KV head, got {policy}")
    if head_group(model) is not None:
        raise ValueError("the model's heads are spread over processes; calibrate PageSparse on a model in one process")


def _search(
    run: PageRun, tables: PageTables, goal: Target, method: str, policy: PageSparse, start: Start
) -> tuple[str, Keeps, PageSample, dict[str, PageSample]]:
    """(name of the best way, its budgets, what they were measured at, what each way was measured at with equal pages)."""
    advance = start("whole plans", (METHODS[method] * TRIES + STEPS) * len(run.texts))
    assert isinstance(policy.keep, (int, float))
    share = goal.bound if goal.quantity == "pages" else run.sample(tables.one(policy.keep), advance).pages
    forms: dict[str, Form] = {ONE: tables.one}
    found = {ONE: _within(run, tables.one, share, advance)}
    if METHODS[method] >= 2:
        forms[HEADS] = tables.fit
    if METHODS[method] >= 3:
        keep = min(tables.keeps, key=lambda k: abs(k - share))
        counts = weights(run.alone(tables.one(keep), start), tables.errors_at(keep))
        forms[LAYERS] = functools.partial(tables.fit, weight=counts)
    for name, form in forms.items():
        if name not in found:
            found[name] = _within(run, form, share, advance)
    best = min(found, key=lambda name: found[name][1].kl)
    keeps, sample = found[best] if goal.quantity == "pages" else _fewest(run, forms[best], tables, goal, advance)
    return best, keeps, sample, {name: one for name, (_, one) in found.items()}


def _within(run: PageRun, form: Form, share: float, advance: Advance) -> tuple[Keeps, PageSample]:
    """The budgets of a form that read the most pages, `share` at most, as measured on the whole model."""
    want, best, least = share, None, 1.0
    for _ in range(TRIES):
        keeps = form(min(max(want, 1e-6), 1.0))
        sample = run.sample(keeps, advance)
        least = min(least, sample.pages)
        if sample.pages <= share and (best is None or sample.pages > best[1].pages):
            best = keeps, sample
        if best is not None and best[1].pages >= NEAR * share:
            break
        want += (1 + NEAR) / 2 * share - sample.pages
    if best is None:
        raise ValueError(f"target 'pages<={share:g}' cannot be met: {least:.4f} of the pages are read where the fewest are")
    return best


def _fewest(run: PageRun, form: Form, tables: PageTables, goal: Target, advance: Advance) -> tuple[Keeps, PageSample]:
    """The budgets of a form that meet a bound on the loss with the fewest pages, by bisection."""
    low, high = (float(tables.read[n].mean()) for n in (0, -1))
    best: tuple[Keeps, PageSample] | None = None
    for share in (low, high):
        keeps = form(share)
        sample = run.sample(keeps, advance)
        if sample.kl <= goal.bound:
            best = keeps, sample
            break
    if best is None:
        at = f"kl is {sample.kl:.6f} with keep {tables.keeps[-1]:g}, where {sample.pages:.4f} of the pages are read"
        raise ValueError(f"target {str(goal)!r} cannot be met: {at}")
    for _ in range(STEPS if share == high else 0):
        middle = (low * high) ** 0.5
        keeps = form(middle)
        sample = run.sample(keeps, advance)
        if sample.kl <= goal.bound:
            best, high = (keeps, sample), middle
        else:
            low = middle
    return best


def _accepted(
    run: PageRun, goal: Target, policy: PageSparse, form: str, keeps: Keeps, sample: PageSample, tried: dict[str, PageSample]
) -> Plan:
    """The plan, which is run once as `transform` runs it, with its notes."""
    rules = [Rule(layer or "*", "decode", dataclasses.replace(policy, keep=_short(keep))) for layer, keep in keeps.items()]
    plan = Plan(prefill=Dense(), decode=policy, rules=tuple(rules))
    kl, worst = run.whole(plan)
    key, meter = run.measured.key, run.meter
    notes = {
        "made by": "tsa_compile.calibrate",
        "target": str(goal),
        "measured": {**dataclasses.asdict(sample), "kl": kl, "worst": worst},
        "budgets": form,
        "ways to spread as many pages": {name: dataclasses.asdict(one) for name, one in tried.items()},
        "errors of heads": "in their layers' outputs" if meter.projected else "as they are: a layer's projection was not found",
        "tokens decoded": key["last"],
        "prompts": len(run.texts),
        "prompt tokens": [ids.shape[1] for ids in run.texts],
        "sparse layers": f"{len(rules)} of {len(meter.layers)}",
        "exact whatever the plan": meter.always_exact,
        "versions": key["versions"],
    }
    if goal.quantity == "kl" and kl > goal.bound * 1.01:
        raise RuntimeError(
            f"the plan has kl {kl:.6f} as it runs, and {sample.kl:.6f} as it was measured: part of it ran untraced"
        )
    return dataclasses.replace(plan, notes=notes)


def _short(keep: tuple[float, ...] | Any) -> float | tuple[float, ...]:
    """One number if all are it."""
    return float(keep[0]) if len(set(keep)) == 1 else tuple(keep)
