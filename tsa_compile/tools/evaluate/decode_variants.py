"""The decode policies that are compared; what needs the model's own attention (roles of heads, shared lists) is fitted here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tsa_compile.learn.gate import schedule_plan
from tsa_compile.learn.head_roles import head_roles
from tsa_compile.learn.routes import plan_routes
from tsa_compile.plan import Plan
from tsa_compile.policies.base import Policy
from tsa_compile.policies.dense import Dense
from tsa_compile.policies.head_split import HeadSplit
from tsa_compile.policies.page_sparse import PageSparse
from tsa_compile.policies.sampled_values import SampledValues
from tsa_compile.policies.schedules import SCHEDULES
from tsa_compile.tools.evaluate.decode_runner import DENSE_PLAN
from tsa_compile.tools.evaluate.variants import DENSE, Variant

FAMILIES = {
    "pages": "pages by mean keys",
    "basis": "pages by eight directions",
    "completed": "pages by mean keys, completed",
    "heads": "roles of heads",
    "sampled": "sampled values",
    "teams": "sampled teams of keys",
    "sparrow": "Sparrow's schedules",
    "reuse": "pages, one layer in four selects",
}
KEEP = (0.05, 0.1, 0.25)
SHARES = (0.15, 0.3)  # of the query heads that look things up
SAMPLES = ((128, "prop"), (512, "prop"), (2048, "flash"))
IN_TEAMS = (256, 1024, 4096)
THRESHOLDS = ("0.80", "0.86", "0.92")
LAYERS_OF_AN_ANCHOR = 4
PUBLISHED_WINDOW = 8192  # of local heads, from 16,384 tokens on
Fit = tuple[str, float, Callable[[], Plan]]  # name, order within the family, the plan
Texts = Sequence[torch.Tensor]  # ids [1, L]


def decode_variants(
    model: nn.Module, families: Sequence[str], keep: Sequence[float], texts: Callable[[], Texts], shortest: int,
    known: Mapping[str, Plan],
) -> list[Variant]:  # fmt: skip
    """Dense first, which reads every key by `Exact`.

    Args:
        model: the causal language model.
        families: some of FAMILIES.
        keep: shares of the pages.
        texts: gives what roles of heads and shared lists are fitted on; not those that are measured.
        shortest: tokens of the shortest prompt; local heads see an eighth of it, at most the published number.
        known: plans that an earlier call fitted, by name.
    """
    window = max(16, min(PUBLISHED_WINDOW, shortest // 8))
    made: Mapping[str, Callable[[], Iterator[Fit]]] = {
        "pages": functools.partial(_pages, keep, "pages", {}),
        "basis": functools.partial(_pages, keep, "by basis", {"kind": "basis"}),
        "completed": functools.partial(_pages, keep, "completed", {"completion": True}),
        "heads": functools.partial(_heads, model, texts, window),
        "sampled": _sampled,
        "teams": _teams,
        "sparrow": functools.partial(_sparrow, sum(p.numel() for p in model.parameters())),
        "reuse": functools.partial(_reuse, model, texts, keep),
    }
    out = [Variant(DENSE, DENSE, DENSE_PLAN)]
    for family in families:
        for name, order, fit in made[family]():
            out.append(Variant(name, FAMILIES[family], known[name] if name in known else fit(), order))
    return out


def _plan(policy: Policy) -> Plan:
    return Plan(prefill=Dense(), decode=policy)


def _fitted(fit: Callable[..., Plan], model: nn.Module, texts: Callable[[], Texts], *args: Any, **kwargs: Any) -> Plan:
    """By a planner of `learn/`, without a bar of its own."""
    return fit(model, texts(), *args, progress=False, **kwargs)


def _pages(keep: Sequence[float], name: str, fields: Mapping[str, Any]) -> Iterator[Fit]:
    for share in keep:
        yield f"{name} {share:.3g}", share, functools.partial(_plan, PageSparse(keep=share, **fields))


def _heads(model: nn.Module, texts: Callable[[], Texts], window: int) -> Iterator[Fit]:
    for share in SHARES:
        policy = HeadSplit((), window=window)
        fit = functools.partial(_fitted, head_roles, model, texts, share, policy=policy)
        yield f"{share:.0%} of the heads look up, window {window:,}", share, fit


def _sampled() -> Iterator[Fit]:
    for samples, form in SAMPLES:
        yield f"sampled {samples} ({form})", samples, functools.partial(_plan, SampledValues(samples, form))


def _teams() -> Iterator[Fit]:
    for samples in IN_TEAMS:
        yield f"teams, {samples} samples", samples, functools.partial(_plan, SampledValues(samples, "teams"))


def _sparrow(parameters: int) -> Iterator[Fit]:
    """Of the published model whose size is nearest."""
    sizes = sorted({name.split("-")[1] for name in SCHEDULES}, key=lambda size: abs(float(size[:-1]) * 1e9 - parameters))
    for name in (f"sparrow-{sizes[0]}-{threshold}" for threshold in THRESHOLDS):
        if name in SCHEDULES:
            yield name, float(name.rsplit("-", 1)[1]), functools.partial(schedule_plan, name)


def _reuse(model: Any, texts: Callable[[], Texts], keep: Sequence[float]) -> Iterator[Fit]:
    anchors = -(-int(model.config.get_text_config().num_hidden_layers) // LAYERS_OF_AN_ANCHOR)
    for share in keep:
        fit = functools.partial(_fitted, plan_routes, model, texts, PageSparse(keep=share), anchors)
        yield f"pages {share:.3g}, {anchors} layers select", share, fit
