"""The one-line interface: `transform`, `restore`, `report`, `explain`."""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from tsa_compile.backend import Backend
from tsa_compile.plan import Plan, as_plan
from tsa_compile.policies.base import Policy
from tsa_compile.report import Report

M = TypeVar("M", bound=nn.Module)
_CALLS = itertools.count()
_MAX_GRAPHS = 64
_BACKENDS: weakref.WeakKeyDictionary[nn.Module, Backend] = weakref.WeakKeyDictionary()


def transform(
    model: M,
    policy_or_plan: Policy | Plan | Mapping[str, Any] | None = None,
    *,
    compiler: str = "eager",
    fullgraph: bool = False,
    inductor_options: Mapping[str, Any] | None = None,
) -> M:
    """Make the attention of `model` token-sparse, in place; returns the same module.

    Works as `nn.Module.compile` does: parameters, `state_dict`, `.to()`, hooks and `generate()` stay as they are; a copy or a
    pickle of the model is dense again. Decode steps (`input_ids` of one token) run as before. Graphs are traced at the other
    first calls (`model(...)`; `model.forward` goes around it); `report(model)` then says what was replaced.
    Sites are replaced only where gradients are off (`torch.no_grad()`, `torch.inference_mode()`). Compiling a transformed
    model again is an error, but for decode steps; in a larger model that is compiled Dynamo inlines it, dense: compile the
    whole with backend "tsa".

    Args:
        model: any module; attention is found in its traced graphs, not by its class.
        policy_or_plan: a policy for all layers, a plan, either as a dict, or None for the default: prefill by `TokenSparse()`.
        compiler: "eager" runs the rewritten graphs as they are (starts fastest); "inductor" compiles them.
        fullgraph: raise if the model's forward does not trace to one graph.
        inductor_options: Inductor configuration for `compiler="inductor"`.

    Raises:
        TypeError: `model` is not a module, or `policy_or_plan` is none of the above.
        ValueError: a rule of the plan matches no module, or names a layer by a number that several stacks of layers have.
        RuntimeError: the model is transformed or compiled already; `restore` it first.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"transform takes a torch.nn.Module, got {type(model).__name__}")
    called = _called(model)
    if called._compiled_call_impl is not None:
        raise RuntimeError("the model is compiled already; call tsa_compile.restore(model) before transforming it again")
    backend = Backend(as_plan(policy_or_plan).bind(called), compiler, inductor_options, called)
    prefill = with_room(isolated(called), backend, fullgraph)
    # Inductor is asked for all steps; the eager graph of a decode step would be the model itself, behind guards.
    called._compiled_call_impl = _entry(prefill, called._call_impl if compiler == "eager" else prefill)
    _BACKENDS[called] = backend
    return model


def restore(model: M) -> M:
    """Undo `transform`; returns the same module.

    Raises:
        ValueError: the model was not transformed.
    """
    _backend_of(model)
    called = _called(model)
    del _BACKENDS[called]
    called._compiled_call_impl = None
    return model


def report(model: nn.Module) -> Report:
    """What `transform` has done so far: one entry for each site of each graph traced.

    Raises:
        ValueError: the model was not transformed.
    """
    return _backend_of(model).report


def explain(
    model: nn.Module,
    *args: Any,
    policy: Policy | Plan | Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """Run `model(*args, **kwargs)` once under `torch.no_grad()` and say which sites `policy` would replace, and why not.

    The model is left as it was. `explain(model, **tokenizer(text, return_tensors="pt"))` is the usual call.
    """
    backend = Backend(as_plan(policy).bind(model), "eager", model=model)
    compiled = with_room(isolated(model), backend)
    with torch.no_grad():
        compiled(*args, **kwargs)
    return backend.report


def with_room(function: Callable[..., Any], backend: Callable[..., Any], fullgraph: bool = False) -> Callable[..., Any]:
    """`torch.compile` with room for more graphs than its usual 8, beyond which Dynamo would run the model dense.

    A server needs more: prefill and decode, one prompt and batches, padded or not, with a cache and without, each first with
    fixed and then with symbolic sizes.
    """
    if "recompile_limit" in inspect.signature(torch.compile).parameters:  # torch 2.13
        return torch.compile(function, backend=backend, fullgraph=fullgraph, recompile_limit=_MAX_GRAPHS)  # type: ignore[call-overload,no-any-return]
    compiled = torch.compile(function, backend=backend, fullgraph=fullgraph)

    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return compiled(*args, **kwargs)
        with torch._dynamo.config.patch(recompile_limit=_MAX_GRAPHS):
            return compiled(*args, **kwargs)

    return call


def isolated(model: nn.Module) -> Callable[..., Any]:
    """The model's call as a function with a code object of its own.

    Dynamo keeps compiled code, and counts recompilations, by code object; a model's forward is shared by all models of its class,
    which would use up each other's limit and then run dense without a word.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return model._call_impl(*args, **kwargs)

    # The name, too: Dynamo also remembers by file, line and name which numbers changed, and makes inputs of them.
    call.__code__ = call.__code__.replace(co_name=f"call_{next(_CALLS)}")
    return call


def _entry(prefill: Callable[..., Any], decode: Callable[..., Any]) -> Callable[..., Any]:
    """The model's call. An error where another torch.compile traces it: that would inline the dense model without a word.

    Decode steps may be traced, as they are dense anyway: `generate()` with a static cache compiles them by itself.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_decode_step(kwargs):
            return decode(*args, **kwargs)
        if torch.compiler.is_compiling():
            _refuse_to_be_traced()
        return prefill(*args, **kwargs)

    return call


def _is_decode_step(kwargs: Mapping[str, Any]) -> bool:
    """Is it a call with one token, by the names that transformers has for them?"""
    names = ("input_ids", "inputs_embeds", "decoder_input_ids")
    tokens = next((kwargs[name] for name in names if kwargs.get(name) is not None), None)
    return isinstance(tokens, torch.Tensor) and tokens.dim() >= 2 and tokens.shape[1] == 1


@torch._dynamo.assume_constant_result  # runs while it is traced
def _refuse_to_be_traced() -> None:
    raise RuntimeError(
        "torch.compile of a module that was transformed by tsa_compile: it is compiled already. "
        'Use torch.compile(model, backend="tsa") instead of transform, or tsa_compile.restore(model) first.'
    )


def _called(model: nn.Module) -> nn.Module:
    """The module whose call is compiled: of a PEFT wrapper its base model, which the wrapper's generate() calls directly."""
    wrapper = type(model).__module__.startswith("peft.") and hasattr(model, "get_base_model")
    return model.get_base_model() if wrapper else model  # type: ignore[operator]


def _backend_of(model: nn.Module) -> Backend:
    backend = _BACKENDS.get(_called(model))
    if backend is None:
        raise ValueError(f"{type(model).__name__} was not transformed by tsa_compile.transform")
    return backend
