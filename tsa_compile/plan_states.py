"""What the cache keeps for the policies of a plan, layer by layer."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import nn

from tsa_compile.cache.head_index import indexes
from tsa_compile.cache.kv_state import KvState
from tsa_compile.plan import Plan
from tsa_compile.rules import layer_number

Kinds = tuple[KvState, ...]


def states_for(plan: Plan, model: nn.Module | None = None) -> Callable[[int], Kinds]:
    """The kinds of state of each layer, by its number: each kind once, and none to select by where another layer selects.

    `model`: its learned indexes are those of layers with the same number in their path.
    """
    every, others, readers = _kinds(plan, decode=True), _kinds(plan, decode=False), _readers(plan)
    found = {} if model is None else {layer_number(path): index for path, index in indexes(model)}

    @functools.cache
    def of(layer: int) -> Kinds:
        kinds = (kind.of(found.get(layer)) for kind in (others if layer in readers else every))
        return tuple(kind for kind in kinds if kind is not None)

    return of


def _kinds(plan: Plan, decode: bool) -> Kinds:
    """Of all policies over a cache; `decode`: those of decode steps too."""
    policies = [plan.verify, plan.draft, *([plan.decode] if decode else [])]
    policies += [rule.policy for rule in plan.rules if decode or rule.phase != "decode"]
    return tuple({kind.name: kind for policy in policies if policy is not None for kind in policy.states()}.values())


def _readers(plan: Plan) -> set[int]:
    """Layers whose decode steps take another one's selection, where the plan names them one by one."""
    named = [entry.modules for entry in plan.reuse or () if entry.phase == "decode"]
    numbers = (modules if isinstance(modules, int) else layer_number(modules) for modules in named)
    return {number for number in numbers if number is not None}
