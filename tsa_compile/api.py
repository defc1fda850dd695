"""The one-line interface: `transform`, `restore`, `report`, `explain`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from tsa_compile import warm_up
from tsa_compile.dynamo import called
from tsa_compile.entry_point import report_of
from tsa_compile.interface import front as interface
from tsa_compile.plan import Plan, as_plan
from tsa_compile.policies.base import Policy
from tsa_compile.report import Report
from tsa_compile.session import Session, attach, attached, detach

M = TypeVar("M", bound=nn.Module)
FRONTS = ("auto", "trace", "interface")


def transform(
    model: M,
    policy_or_plan: Policy | Plan | Mapping[str, Any] | None = None,
    *,
    compiler: str = "eager",
    fullgraph: bool = False,
    inductor_options: Mapping[str, Any] | None = None,
    front: str = "auto",
    warm: bool | int = False,
) -> M:
    """Make the attention of `model` sparse, in place; returns the same module.

    Works as `nn.Module.compile` does: parameters, `state_dict`, `.to()`, hooks (also those added later) and `generate()` work as
    before; a copy or a pickle of the model is dense again. Decode steps (`input_ids` of one token) run as before, unless the plan
    names a policy for them, or the default plan has `Exact` where it was measured to pay (`default_decode.py`). Graphs are traced
    at the other first calls (`model(...)`; `model.forward` goes around it); `report(model)` then says what was replaced.
    Sites are replaced only where gradients are off (`torch.no_grad()`, `torch.inference_mode()`). To compile or export a
    transformed model, alone or in a larger one, is an error, but for decode steps; a forward pre-hook of ours sees to that.

    Args:
        model: any module; attention is found in its traced graphs, not by its class.
        policy_or_plan: a policy for all layers, a plan, either as a dict, or None for the default: prefill by `BlockSparse()`.
        compiler: "eager" runs the rewritten graphs as they are (starts fastest); "inductor" compiles them.
        fullgraph: raise if the model's forward does not trace to one graph.
        inductor_options: Inductor configuration for `compiler="inductor"`.
        front: "trace" finds attention in graphs; "interface" takes the place of a transformers model's attention function, which
            needs no trace, but has prefill alone and no compiler; "auto" is the interface where accelerate's hooks lie between
            layers (`device_map` over several devices), as each hook breaks a graph and hides what masks are, else a trace.
        warm: trace and compile at once what calls of up to so many rows need (True: 8), by calls with random tokens; `tsa.warm`.

    Raises:
        TypeError: `model` is not a module, or `policy_or_plan` is none of the above.
        ValueError: a rule of the plan matches no module, or names a layer by a number that several stacks of layers have; or the
            policy is for denoising alone, which `generate.diffusion.diffuse` does; or `front` is none of these, or "interface"
            where the model, the plan or another option rules that out.
        RuntimeError: the model is transformed or compiled already; `restore` it first.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"transform takes a torch.nn.Module, got {type(model).__name__}")
    _check_phases(policy_or_plan)
    plan = as_plan(policy_or_plan)
    if _by_interface(front, model, plan, plain=compiler == "eager" and not fullgraph and inductor_options is None):
        interface.take(called(model), plan)
    else:
        attach(model, lambda: Session(model, plan, compiler, inductor_options, fullgraph))
    if warm:
        warm_up.warm(model, warm_up.MAX_BATCH if warm is True else warm)
    return model


def _by_interface(front: str, model: nn.Module, plan: Plan, plain: bool) -> bool:
    """Is the attention interface the way in? `plain`: nothing is asked for that only graphs have."""
    if front not in FRONTS:
        raise ValueError(f"front must be one of {FRONTS}, got {front!r}")
    if front == "interface" and not plain:
        raise ValueError("front='interface' makes no graphs: compiler must be 'eager', without fullgraph and inductor_options")
    fits = plain and not plan.decodes and hasattr(model, "set_attn_implementation")
    return front == "interface" or (front == "auto" and fits and interface.is_spread(model))


def restore(model: M) -> M:
    """Undo `transform`; returns the same module.

    Raises:
        ValueError: the model was not transformed.
    """
    if interface.front_of(called(model)) is not None:
        interface.give_back(called(model))
    elif not detach(model):
        raise ValueError(_not_transformed(model))
    return model


def report(model: Any) -> Report:
    """What happened so far: one entry for each site of each graph traced.

    Args:
        model: a model that was transformed; or what `torch.compile(..., backend="tsa")` gave, or was given.

    Raises:
        ValueError: it is neither, or the latter was not called yet.
        RuntimeError: something else has compiled the transformed model since.
    """
    own = interface.front_of(called(model)) if isinstance(model, nn.Module) else None
    if own is not None:
        return own.report
    session = attached(model) if isinstance(model, nn.Module) else None
    found = session.report if session is not None else report_of(model)
    if found is None:
        raise ValueError(_not_transformed(model))
    return found


def explain(
    model: nn.Module,
    *args: Any,
    policy: Policy | Plan | Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """Run `model(*args, **kwargs)` once under `torch.no_grad()` and say which sites `policy` would replace, and why not.

    The model is left as it was. `explain(model, **tokenizer(text, return_tensors="pt"))` is the usual call.
    """
    _check_phases(policy)
    session = Session(model, as_plan(policy))
    with torch.no_grad():
        session(*args, **kwargs)
    return session.report


def _check_phases(policy: object) -> None:
    """A policy that no call of a model would reach is an error: under it alone the default plan would run."""
    if isinstance(policy, Policy) and policy.phases <= {"denoise_first", "denoise"}:
        phases = " and ".join(sorted(policy.phases))
        raise ValueError(
            f"{policy.name} is for {phases}, phases of generate.diffusion.diffuse; a model's own calls have none of them"
        )
    if isinstance(policy, Policy) and policy.phases <= {"verify", "draft"}:
        raise ValueError(f"{policy} is for drafts and their verification: tsa_compile.generate(model, ..., draft=...) has both")


def _not_transformed(model: Any) -> str:
    name = type(model).__name__
    return f'{name} was not transformed by tsa_compile.transform, and has no graph of torch.compile(..., backend="tsa")'
