"""`torch.compile(model, backend="tsa", options={...})`: the entry point, its options and its report."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from tsa_compile.backend import Backend
from tsa_compile.dynamo import first_frame
from tsa_compile.plan import Plan, as_plan, without_session
from tsa_compile.policies.token_sparse import TokenSparse
from tsa_compile.report import Report
from tsa_compile.traced import TracedGraph

_POLICY_FIELDS = tuple(f.name for f in dataclasses.fields(TokenSparse))


@dataclasses.dataclass(frozen=True)
class _Compiled:
    """A graph that this backend was given, and what it belongs to: its modules (their ids), and the function it begins in."""

    graph: weakref.ref[TracedGraph]
    backend: weakref.ref[Backend]
    modules: frozenset[str]
    function: tuple[str, str]


_COMPILED: list[_Compiled] = []


def tsa(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Entry point `tsa` of the group `torch_dynamo_backends`. `tsa_compile.report(compiled)` says what it did.

    Args:
        mode: an Inductor mode, such as "reduce-overhead"; the plan is then the default one.
        options: `policy` (a policy, a plan, or either as a dict) or fields of `TokenSparse`, as in `transform`; `compiler`;
            everything else is Inductor configuration.

    Raises:
        ValueError: an option that neither this backend nor Inductor knows, or a value outside its range.
    """
    plan, compiler, rest = parse(dict(options or {}))
    if mode is not None:
        rest.update(torch._inductor.list_mode_options(mode))
    backend = Backend(plan, compiler, rest)
    modules = {key.split("@")[0] for node in gm.graph.nodes for key in node.meta.get("nn_module_stack") or ()}
    function = first_frame(gm)
    run = backend(gm, example_inputs)
    (graph,) = backend.graphs
    _COMPILED[:] = [c for c in _COMPILED if c.graph() is not None]
    _COMPILED.append(_Compiled(weakref.ref(graph), weakref.ref(backend), frozenset(modules), function))
    return run


def report_of(compiled: Any) -> Report | None:
    """The report of what `torch.compile(..., backend="tsa")` gave, or of the module in it; None if it has no graph of ours."""
    target = getattr(compiled, "_orig_mod", None) or getattr(compiled, "_torchdynamo_orig_callable", compiled)
    code = getattr(target, "__code__", None)
    function = (code.co_filename, code.co_name) if code is not None else None
    modules = {str(id(m)) for m in target.modules()} if isinstance(target, nn.Module) else set()
    report: Report | None = None
    for entry in _COMPILED:
        backend = entry.backend()
        if backend is not None and (entry.function == function or not modules.isdisjoint(entry.modules)):
            report = backend.report if report is None else report.joined(backend.report)
    return report


def parse(options: dict[str, Any]) -> tuple[Plan, str, dict[str, Any]]:
    """Split the user's options into plan, compiler and Inductor configuration."""
    compiler = options.pop("compiler", "inductor")
    fields = {name: options.pop(name) for name in _POLICY_FIELDS if name in options}
    policy = options.pop("policy", None)
    if fields and policy is not None:
        raise ValueError(f"give either a policy or its fields, not both: {sorted(fields)}")
    plan = without_session(as_plan(TokenSparse(**fields) if fields else policy))
    unknown = sorted(set(options) - set(torch._inductor.list_options()))
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r} for backend 'tsa': neither tsa_compile nor Inductor has it")
    return plan, compiler, options


def register() -> None:
    """Make `backend="tsa"` known in a checkout that is not installed (an installed one has its entry point)."""
    if "tsa" not in torch._dynamo.list_backends(exclude_tags=()):
        torch._dynamo.register_backend(tsa, name="tsa")
