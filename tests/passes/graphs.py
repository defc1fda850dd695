"""Graphs to test the passes on: the same function as Dynamo and as torch.export see it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import tsa_compile as tsa
from tsa_compile.backend import Backend
from tsa_compile.passes.pipeline import run_pipeline
from tsa_compile.plan import Plan
from tsa_compile.policies.base import Policy

# Keeps every token through the sparse path: no row is short enough to run dense.
KEEP_ALL = tsa.TokenSparse.paper(coverage=0.0, window=1, pool=1, min_tokens=1, min_queries=0)


@dataclasses.dataclass
class Outcome:
    """What the passes decided about a function, and what the rewritten function computes."""

    result: Any
    replaced: list[bool]
    reasons: list[str]
    warnings: list[str]


class Wrapped(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def by_dynamo(function: Callable[..., Any], *args: Any, policy: Policy = KEEP_ALL) -> Outcome:
    """Through `torch.compile`."""
    torch._dynamo.reset()
    backend = Backend(Plan(policy), "eager")
    with torch.no_grad():
        result = torch.compile(function, backend=backend, fullgraph=True)(*args)
    report = backend.report
    return Outcome(result, [s.replaced for s in report.sites], [s.reason for s in report.sites], report.warnings)


def by_export(function: Callable[..., Any], *args: Any, policy: Policy = KEEP_ALL, dynamic_shapes: Any = None) -> Outcome:
    """Through `torch.export`."""
    with torch.no_grad():
        shapes = None if dynamic_shapes is None else {"args": dynamic_shapes}
        program = torch.export.export(Wrapped(function).eval(), args, dynamic_shapes=shapes)
        gm = program.graph_module
        constants = _constants(program)
        found = run_pipeline(gm, lambda site: policy, constants=constants)
        result = program.module()(*args)
    reasons = [d.reason or "" for d in found.decisions]
    return Outcome(result, [not r for r in reasons], reasons, found.warnings)


def _constants(program: torch.export.ExportedProgram) -> dict[str, torch.Tensor]:
    held = {**program.state_dict, **program.constants}
    named = {
        **program.graph_signature.inputs_to_buffers,
        **program.graph_signature.inputs_to_lifted_tensor_constants,
    }
    return {name: held[target] for name, target in named.items() if isinstance(held.get(target), torch.Tensor)}
