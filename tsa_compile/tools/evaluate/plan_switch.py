"""A backend that traces a model once and then runs it under any number of plans.

Tracing is the slow part of `transform` (seconds a model and form of call); the passes take far less. So each traced graph is kept
as it came, and each plan rewrites a copy of it the first time it runs. What runs is what `transform(model, plan)` runs.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.utils._python_dispatch import TorchDispatchMode

from tsa_compile.plan import Plan

Run = Callable[..., Any]


class PlanSwitch:
    """For `torch.compile(backend=...)`; set `plan` between calls.

    Attributes:
        plan: what the next calls run.
        executed: layers whose selections ran since it was last cleared, in order.
        layers: layer -> path of its attention module, for every layer that `widest` makes sparse.
        around: entered around each run of a graph.
    """

    def __init__(self, widest: Plan) -> None:
        """`widest`: sparse wherever a plan may be; the plan at first."""
        self.plan = widest
        self.executed: list[int] = []
        self.layers: dict[int, str] = {}
        self.around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        self._widest = widest
        self._forms: dict[tuple[int, int], tuple[Run, list[int], Plan]] = {}  # the plan lives as long as its id is a key
        self._graphs = 0

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Run:
        number = self._graphs
        self._graphs += 1
        self._form(number, gm, self._widest)  # now, while Dynamo still takes guards

        def run(*args: Any) -> Any:
            forward, layers, _ = self._form(number, gm, self.plan)
            self.executed.extend(layers)
            with self.around():
                return forward(*args)

        return run

    def _form(self, number: int, gm: fx.GraphModule, plan: Plan) -> tuple[Run, list[int], Plan]:
        from tsa_compile.passes.pipeline import run_pipeline

        key = (number, id(plan))
        if key not in self._forms:
            form = fx.GraphModule(gm, copy.deepcopy(gm.graph))
            decisions = run_pipeline(form, plan.policy_for).decisions
            sites = [d.site for d in decisions if d.reason is None]
            if plan is self._widest:
                self.layers.update({s.layer: s.module for s in sites})
            self._forms[key] = (form.forward, [s.layer for s in sites], plan)
        return self._forms[key]


class RecordSelections(TorchDispatchMode):
    """Inside, keeps (indices [B, G, Lk], counts [B]) of each selection in `selections`, on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.selections: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.tsa.select_tokens.default:
            self.selections.append((out[0].cpu(), out[1].cpu()))
        return out
