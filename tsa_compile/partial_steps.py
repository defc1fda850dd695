"""A plan whose decode policy reads a cache that keeps rows elsewhere too, on other ranks or the host."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tsa_compile.cache.entry import Prepared

if TYPE_CHECKING:
    from tsa_compile.backend import Backend
    from tsa_compile.plan import Plan


def keeping_of(plan: Plan, model: nn.Module | None = None) -> Any:
    """How the layers of a cache of `model` keep their rows under `plan`; None: in their buffers.

    Raises:
        ValueError: the decode policies of its layers differ in that.
        GroupError: `Routed`, and this process is not in the group.
    """
    named = {plan.decode, *(rule.policy for rule in plan.rules if rule.phase == "decode")}
    kept = [policy for policy in named if policy is not None and policy.needs_session]
    if not kept:
        return None
    if len(kept) < len(named) or len({policy.keeping(model) for policy in kept}) > 1:
        raise ValueError(
            f"{kept[0].name} keeps the cache of all layers in its way: let every decode policy of the plan be the same"
        )
    return kept[0].keeping(model)


def begins(prepared: Prepared) -> bool:
    """Is the cache empty?"""
    return prepared.cache is not None and prepared.cache.get_seq_length() == 0


def settle(prepared: Prepared) -> None:
    """After a prompt, or a part of one: its rows go where they are kept."""
    for n in prepared.ours:
        prepared.cache.layers[n].settle()


def check_layers(prepared: Prepared, keeping: Any, why: str | None) -> None:
    """Before a decode step: the cache keeps its rows as the plan says, and if not in buffers alone the step runs on these.

    Raises:
        RuntimeError: it does not, or `why` it does not.
    """
    layers = () if prepared.cache is None else prepared.cache.layers
    others = [n for n, layer in enumerate(layers) if getattr(layer, "keeping", None) != keeping]
    if others and why is None:
        wanted = "all in buffers" if keeping is None else keeping
        why = f"the plan's keys are {wanted}, and layers {others} of the cache are of another kind or plan"
    if why is not None and (keeping is not None or others):
        raise RuntimeError(f"a decode step cannot run on this cache: {why}. Take another decode policy, or a new cache")


def with_positions(model: Any, given: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    """The arguments of a step with the new token's position, which the model cannot tell from such a cache.

    Raises:
        RuntimeError: its forward takes none.
    """
    if given.get("position_ids") is not None:
        return dict(given)
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise RuntimeError(f"a decode step cannot run on this cache: {type(model).__name__} takes no position_ids")
    layer = cache.layers[0]
    return {**given, "position_ids": torch.full((1, 1), layer.count(), device=layer.settled().keys.device)}


def check_replaced(backend: Backend, runs: int, layers: int) -> None:
    """After a decode step: its policy took all of its attentions, or the result is of the buffers' rows alone.

    Raises:
        RuntimeError: it did not.
    """
    if backend.replaced(runs) < layers:
        raise RuntimeError(f"not all {layers} attentions of a decode step were replaced: {dense_sites(backend)}")


def dense_sites(backend: Backend) -> list[str]:
    """The attentions that were traced and not replaced, with the reasons."""
    return sorted({f"{s.module}: {s.reason}" for s in backend.sites() if not s.replaced})
