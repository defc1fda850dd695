"""What the cache keeps for the policies of a plan, layer by layer."""

from __future__ import annotations

from collections.abc import Callable

from tsa_compile.cache.kv_state import KvState
from tsa_compile.plan import Plan
from tsa_compile.rules import layer_number

Kinds = tuple[KvState, ...]


def states_for(plan: Plan) -> Callable[[int], Kinds]:
    """The kinds of state of each layer, by its number: each kind once, and none to select by where another layer selects."""
    every, others, readers = _kinds(plan, decode=True), _kinds(plan, decode=False), _readers(plan)
    return lambda layer: others if layer in readers else every


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
