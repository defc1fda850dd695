"""The torch.compile backend: `torch.compile(model, backend="tsa", options={...})`.

A Dynamo graph goes through `passes.pipeline` and then to Inductor, or runs as it is with `compiler="eager"`.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch

from tsa_compile.plan import Plan, as_plan
from tsa_compile.policies.token_sparse import TokenSparse
from tsa_compile.report import Report

log = logging.getLogger("tsa_compile")
COMPILERS = ("inductor", "eager")
_POLICY_FIELDS = tuple(f.name for f in dataclasses.fields(TokenSparse))


class Backend:
    """A callable for `torch.compile(backend=...)` that applies `plan` and collects a report.

    Args:
        plan: layer -> policy.
        compiler: "inductor", or "eager" to run the rewritten graph as it is.
        inductor_options: Inductor configuration for this backend only, such as {"max_autotune": True}.
        model: names the layers, also in graphs that begin inside it, as after a graph break.

    Raises:
        ValueError: unknown compiler, or options for a compiler that takes none.
    """

    def __init__(
        self,
        plan: Plan,
        compiler: str = "inductor",
        inductor_options: Mapping[str, Any] | None = None,
        model: torch.nn.Module | None = None,
    ) -> None:
        if compiler not in COMPILERS:
            raise ValueError(f"compiler must be one of {COMPILERS}, got {compiler!r}")
        if compiler == "eager" and inductor_options:
            raise ValueError(f"compiler='eager' takes no Inductor options, got {sorted(inductor_options)}")
        self.plan = plan
        self.compiler = compiler
        self.inductor_options = dict(inductor_options or {})
        self.report = Report()
        self._model: Callable[[], torch.nn.Module | None] = (lambda: None) if model is None else weakref.ref(model)

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        from tsa_compile.passes.pipeline import run_pipeline
        from tsa_compile.watched import Watched, module_tensors

        name_modules(gm, self._model())
        original = torch.fx.GraphModule(gm, copy.deepcopy(gm.graph))
        tensors = module_tensors(gm, example_inputs)
        result = run_pipeline(gm, self.plan.policy_for, example_inputs=example_inputs, constants=tensors)
        self.report.add(result)
        for warning in result.warnings:
            log.warning(warning)
        compiled = gm.forward if self.compiler == "eager" else self._inductor(gm, example_inputs)
        if not result.patterns:
            return compiled
        return Watched(compiled, original, result.patterns, tensors, partial(self._fall_back, self.report.graphs - 1))

    def _fall_back(self, graph: int, reason: str) -> None:
        self.report.fall_back(graph, reason)
        log.warning(reason)

    def _inductor(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        from tsa_compile.passes.pipeline import pipeline_identity

        # The compile caches do not see what an operator's fake does: its source joins the user's own tag.
        tag = f"{torch.compiler.config.cache_key_tag}|tsa:{pipeline_identity(self.plan.to_dict())}"
        with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
            return cast(Callable[..., Any], compile_fx(gm, list(example_inputs), config_patches=self.inductor_options or None))


def name_modules(gm: torch.fx.GraphModule, model: torch.nn.Module | None) -> None:
    """Give the modules of a Dynamo graph their names in `model`; Dynamo names them from the frame in which the graph begins."""
    names = {} if model is None else {str(id(module)): name for name, module in model.named_modules()}
    for node in gm.graph.nodes if names else ():
        stack = node.meta.get("nn_module_stack") or {}  # {id of a module, maybe "@" and a number: (path, class)}
        node.meta["nn_module_stack"] = {k: (names.get(k.split("@")[0], path), *kind) for k, (path, *kind) in stack.items()}


def tsa(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Entry point `tsa` of the group `torch_dynamo_backends`.

    Args:
        mode: an Inductor mode, such as "reduce-overhead"; the policy is then the default one.
        options: `policy` (a policy, a plan, or either as a dict) or fields of `TokenSparse`; `compiler`;
            everything else is Inductor configuration.

    Raises:
        ValueError: an option that neither this backend nor Inductor knows, or a value outside its range.
    """
    plan, compiler, rest = _parse(dict(options or {}))
    if mode is not None:
        rest.update(torch._inductor.list_mode_options(mode))
    return Backend(plan, compiler, rest)(gm, example_inputs)


def _parse(options: dict[str, Any]) -> tuple[Plan, str, dict[str, Any]]:
    """Split the user's options into plan, compiler and Inductor configuration."""
    compiler = options.pop("compiler", "inductor")
    fields = {name: options.pop(name) for name in _POLICY_FIELDS if name in options}
    policy = options.pop("policy", None)
    if fields and policy is not None:
        raise ValueError(f"give either a policy or its fields, not both: {sorted(fields)}")
    plan = as_plan(TokenSparse(**fields) if fields else policy)
    known = set(torch._inductor.list_options())
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r} for backend 'tsa': neither tsa_compile nor Inductor has it")
    return plan, compiler, options


def register() -> None:
    """Make `backend="tsa"` known in a checkout that is not installed (an installed one has its entry point)."""
    if "tsa" not in torch._dynamo.list_backends(exclude_tags=()):
        torch._dynamo.register_backend(tsa, name="tsa")
