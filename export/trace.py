"""torch.export a model and apply a policy: the common first step of every export."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.fx as fx
from torch import nn
from torch.export import ExportedProgram

from tsa_compile.export.errors import ExportError
from tsa_compile.export.fuse import fuse_selection
from tsa_compile.plan import Plan, as_plan
from tsa_compile.policies.base import Policy
from tsa_compile.policies.probe_sparse import ProbeSparse


class Traced(NamedTuple):
    """A rewritten program.

    program: its sites are `tsa::token_sparse_attention` nodes.
    plan: what was applied.
    sites: the nodes, in graph order.
    decisions: one for each attention site found, replaced or not.
    """

    program: ExportedProgram
    plan: Plan
    sites: list[fx.Node]
    decisions: Sequence[Any]


def trace(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    policy: Policy | Plan | Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    require_sites: bool = True,
) -> Traced:
    """Export `model` and replace its attention sites.

    Args:
        model: a module, exported with `torch.export` without gradients; or an ExportedProgram, rewritten in place.
        args, kwargs: example inputs (not read for an ExportedProgram).
        policy: a policy, a plan, either as a dict, or None for the default plan, `TokenSparse()`.
        dynamic_shapes: as for `torch.export.export`.
        require_sites: raise if no site takes the policy.

    Raises:
        ExportError: no site was replaced; the message gives each site's reason.
        ValueError: `model` was transformed and no `policy` is given.
    """
    import tsa_compile.kernels.ops  # noqa: F401  (registers the operators)
    from tsa_compile.passes.pipeline import run_pipeline

    if isinstance(model, nn.Module) and model._compiled_call_impl is not None and policy is None:
        raise ValueError("the model is transformed; an export starts from its forward, so pass the policy or plan again")
    plan = as_plan(policy)
    program = model if isinstance(model, ExportedProgram) else _export(model, args, kwargs, dynamic_shapes)
    result = run_pipeline(program.graph_module, plan.policy_for, constants=_constants(program))
    for d in result.decisions:
        if d.reason is None and isinstance(d.policy, ProbeSparse):
            raise ExportError(f"{d.site.module or d.site.layer}: exports take the policy TokenSparse, not ProbeSparse")
    sites = fuse_selection(program.graph_module)
    if require_sites and not sites:
        reasons = "; ".join(f"{d.site.module or d.site.layer}: {d.reason}" for d in result.decisions)
        raise ExportError(f"no attention site was replaced ({reasons or 'none was found'})")
    return Traced(program, plan, sites, result.decisions)


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, dynamic_shapes: Any) -> ExportedProgram:
    with torch.no_grad(), _plain_call(model):
        return torch.export.export(model, args, dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=False)


def _constants(program: ExportedProgram) -> dict[str, torch.Tensor]:
    """Parameters, buffers and constants that no call changes, by placeholder name."""
    signature = program.graph_signature
    mutated = set(signature.buffers_to_mutate.values())
    held: dict[str, torch.Tensor] = {**program.state_dict, **program.constants}
    targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    targets.update(signature.inputs_to_lifted_tensor_constants)
    return {name: held[target] for name, target in targets.items() if target not in mutated}


@contextlib.contextmanager
def _plain_call(model: nn.Module) -> Iterator[None]:
    """Inside, calling `model` runs its forward, not what `Module.compile` made of it."""
    compiled, model._compiled_call_impl = model._compiled_call_impl, None
    try:
        yield
    finally:
        model._compiled_call_impl = compiled
