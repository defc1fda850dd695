"""torch.export a model and apply a policy: the common first step of every export."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.fx as fx
from torch import nn
from torch.export import ExportedProgram

from tsa_compile.export.common import ExportError
from tsa_compile.export.fuse import fuse_selection, refuse_other_operators
from tsa_compile.plan import Plan, as_plan, without_session
from tsa_compile.policies.base import Policy
from tsa_compile.policies.token_sparse import TokenSparse


class Traced(NamedTuple):
    """A rewritten program.

    program: its sites are `tsa::token_sparse_attention` nodes, or, with `one_node=False`, what the policies made of them.
    plan: what was applied.
    sites: the `tsa::token_sparse_attention` nodes, in graph order; empty with `one_node=False`.
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
    one_node: bool = True,
) -> Traced:
    """Export `model` and replace its attention sites; `model` itself stays as it is.

    Args:
        model: a module, exported with `torch.export` without gradients; or an ExportedProgram, of which a copy is
            rewritten (it shares the weights).
        args, kwargs: example inputs (not read for an ExportedProgram).
        policy: a policy, a plan, either as a dict, or None for `TokenSparse()`.
        dynamic_shapes: as for `torch.export.export`.
        require_sites: raise if no site takes the policy.
        one_node: make each site one node `tsa::token_sparse_attention`, as targets outside PyTorch need it.

    Raises:
        ExportError: no site was replaced; the message gives each site's reason. Or `one_node`, and a policy or an option
            of it is none that one node expresses.
        ValueError: `model` was transformed and no `policy` is given; or a rule of the plan matches no module.
    """
    import tsa_compile.kernels.ops  # noqa: F401  (registers the operators)
    from tsa_compile.passes.pipeline import run_pipeline

    if isinstance(model, nn.Module) and model._compiled_call_impl is not None and policy is None:
        raise ValueError("the model is transformed; an export starts from its forward, so pass the policy or plan again")
    plan = without_session(as_plan(TokenSparse() if policy is None else policy))
    program = _copy(model) if isinstance(model, ExportedProgram) else _export(model, args, kwargs, dynamic_shapes)
    bound = plan.bind_to(_modules(program))
    result = run_pipeline(program.graph_module, bound.policy_for, constants=_constants(program))
    replaced = [d for d in result.decisions if d.reason is None]
    sites: list[fx.Node] = []
    if one_node:
        sites = fuse_selection(program.graph_module)
        refuse_other_operators(program.graph_module, {d.policy.name for d in replaced if not isinstance(d.policy, TokenSparse)})
    if require_sites and not replaced:
        reasons = "; ".join(f"{d.site.module or d.site.layer}: {d.reason}" for d in result.decisions)
        raise ExportError(f"no attention site was replaced ({reasons or 'none was found'})")
    return Traced(program, plan, sites, result.decisions)


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, dynamic_shapes: Any) -> ExportedProgram:
    with torch.no_grad(), _plain_call(model):
        return torch.export.export(model, args, dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=False)


def export_program(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    policy: Policy | Plan | Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> ExportedProgram:
    """`torch.export.export(model, args, kwargs)` with the policy in it, also of a model that `transform` has changed.

    `torch.export.export` itself traces the dense model. The operators are `torch.ops.tsa.*`: a process that runs the program
    imports tsa_compile. Arguments and errors: `trace`.
    """
    return trace(model, args, kwargs, policy=policy, dynamic_shapes=dynamic_shapes, one_node=False).program


def _copy(program: ExportedProgram) -> ExportedProgram:
    """A program whose graph and signature may be changed; tensors are shared."""
    module = fx.GraphModule(program.graph_module, copy.deepcopy(program.graph_module.graph))
    module.meta.update(program.graph_module.meta)
    return ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=copy.deepcopy(program.graph_signature),
        state_dict=program.state_dict,
        range_constraints=copy.deepcopy(program.range_constraints),
        module_call_graph=copy.deepcopy(program.module_call_graph),
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )


def _modules(program: ExportedProgram) -> list[str]:
    """Paths of the modules that the program calls, in order."""
    stacks = (node.meta.get("nn_module_stack") or {} for node in program.graph.nodes)
    return list(dict.fromkeys(str(path) for stack in stacks for path, _ in stack.values()))


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
