"""A plan whose decode policy spreads a sequence over a process group: what this rank keeps, and what must hold of each step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tsa_compile.cache.entry import Prepared
from tsa_compile.cache.sharded import Shard, spread_as
from tsa_compile.policies.routed import Routed

if TYPE_CHECKING:
    from tsa_compile.backend import Backend
    from tsa_compile.plan import Plan


def shard_of(plan: Plan) -> Shard | None:
    """The part of each sequence that this process keeps under `plan`; None: all of it.

    Raises:
        ValueError: some layers are `Routed` and others not, or in several groups.
        GroupError: this process is not in the group.
    """
    named = {plan.decode, *(rule.policy for rule in plan.rules if rule.phase == "decode")}
    groups = {policy.group_name if isinstance(policy, Routed) else None for policy in named}
    if groups == {None}:
        return None
    if len(groups) > 1:
        raise ValueError("Routed spreads the cache of all layers: every decode policy of the plan must be Routed, in one group")
    return Shard.of(next(g for g in groups if g is not None))


def begins(prepared: Prepared) -> bool:
    """Is the cache empty?"""
    return prepared.cache is not None and prepared.cache.get_seq_length() == 0


def settle(prepared: Prepared) -> None:
    """After a prompt, or a part of one: each rank lets go of the rows that others keep."""
    for n in prepared.ours:
        prepared.cache.layers[n].settle()


def check_layers(prepared: Prepared, shard: Shard | None, why: str | None) -> None:
    """Before a decode step: the cache is spread as the plan says, and if so it runs on fixed buffers.

    Raises:
        RuntimeError: it is not, or `why` it does not.
    """
    layers = () if prepared.cache is None else prepared.cache.layers
    others = [n for n, layer in enumerate(layers) if spread_as(layer) != shard]
    if others and why is None:
        spread = "not spread" if shard is None else f"spread over group {shard.group!r}"
        why = f"the plan's keys are {spread}, and layers {others} of the cache are of another kind or plan"
    if why is not None and (shard is not None or others):
        raise RuntimeError(f"Routed: a decode step cannot run on this cache: {why}. Take another decode policy, or a new cache")


def check_replaced(backend: Backend, runs: int, layers: int) -> None:
    """After a decode step: all of its attentions were `Routed`, or the result is of this rank's keys alone.

    Raises:
        RuntimeError: they were not.
    """
    if backend.replaced(runs) < layers:
        dense = {f"{s.module}: {s.reason}" for s in backend.sites() if s.policy == "Routed" and not s.replaced}
        raise RuntimeError(f"Routed: not all {layers} attentions of a decode step were replaced: {sorted(dense)}")
