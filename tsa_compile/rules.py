"""Rules of a plan: which attention modules a policy is for, by their paths."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from tsa_compile.passes.site import PHASES
from tsa_compile.policies.base import Policy


class Rule(NamedTuple):
    """One policy for some attention modules in one phase; the first rule of a plan that matches decides.

    Args:
        modules: a pattern (`fnmatch`: `*`, `?`, `[0-3]`) of the module's path, such as "model.layers.[0-3].*", or the number of a
            layer, as plans of format 1 have it: the modules whose path has it as its first number.
        phase: one of `PHASES`.
        policy: what they get.
    """

    modules: str | int
    phase: str
    policy: Policy

    def matches(self, module: str, index: int | None = None) -> bool:
        """Is it for the module of this path? `index` stands for the layer's number where the path has none."""
        if isinstance(self.modules, str):
            return fnmatch.fnmatchcase(module, self.modules)
        number = layer_number(module)
        return self.modules == (index if number is None else number)


def read_rules(given: Any) -> tuple[Rule, ...]:
    """Rules from what users pass.

    Raises:
        ValueError, TypeError: a rule that is none; the message names it.
    """
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"Plan.rules must be a list of (modules, phase, policy), got {type(given).__name__}")
    return tuple(_rule(f"Plan.rules[{n}]", rule) for n, rule in enumerate(given))


def _rule(field: str, given: Any) -> Rule:
    if not isinstance(given, (tuple, list)) or len(given) != 3:
        raise TypeError(f"{field} must be (modules, phase, policy), got {given!r}")
    modules, phase, policy = given
    is_number = type(modules) is int and modules >= 0
    if not is_number and not (isinstance(modules, str) and modules):
        raise ValueError(f"{field}.modules must be a pattern or a layer's number, got {modules!r}")
    if phase not in PHASES:
        raise ValueError(f"{field}.phase must be one of {PHASES}, got {phase!r}")
    check_policy(f"{field}.policy", phase, policy)
    return Rule(modules, phase, policy)


def check_policy(field: str, phase: str, policy: object) -> None:
    """Raise a TypeError or ValueError that names the field, unless it holds a policy for the phase."""
    if not isinstance(policy, Policy):
        raise TypeError(f"{field} must be a policy, got {type(policy).__name__}")
    if phase not in policy.phases:
        raise ValueError(f"{field}: {policy.name} is for {' and '.join(sorted(policy.phases))}, not for {phase}")


def layer_number(module: str) -> int | None:
    """The first number of a path: 3 of "model.layers.3.self_attn"; None if it has none."""
    found = re.search(r"(?:^|\.)(\d+)(?=\.|$)", module)
    return int(found[1]) if found else None


def bind(rules: Iterable[Rule], modules: Iterable[str]) -> Iterator[Rule]:
    """The rules with patterns in place of layer numbers.

    Args:
        rules: of a plan.
        modules: the paths of all modules of the model.

    Raises:
        ValueError: a rule matches none of them, or a layer's number is found in several stacks of layers.
    """
    paths = list(modules)
    numbered = any(layer_number(path) is not None for path in paths)
    for n, rule in enumerate(rules):
        if isinstance(rule.modules, int) and numbered:
            layer = _layer_path(rule.modules, paths)
            yield from (rule._replace(modules=pattern) for pattern in (layer, f"{layer}.*"))
            continue
        if isinstance(rule.modules, str) and not any(rule.matches(path) for path in paths):
            raise ValueError(f"plan rule {n}: no module of the model matches {rule.modules!r}; it has {_some(paths)}")
        yield rule


def under(pattern: str | int, module: str, index: int | None = None) -> bool:
    """Does a pattern name a module, or one above it? A number: as `Rule.modules` has it."""
    if isinstance(pattern, str):
        return any(fnmatch.fnmatchcase(module, p) for p in (pattern, f"{pattern}.*"))
    number = layer_number(module)
    return pattern == (index if number is None else number)


def bound(pattern: str | int, paths: list[str], where: str) -> str | int:
    """A pattern with a path in place of a layer's number, if layers are numbered. Raises a ValueError if it matches none."""
    if isinstance(pattern, int):
        return _layer_path(pattern, paths) if any(layer_number(path) is not None for path in paths) else pattern
    if not any(under(pattern, path) for path in paths):
        raise ValueError(f"{where}: no module of the model matches {pattern!r}; it has {_some(paths)}")
    return pattern


def _layer_path(number: int, paths: list[str]) -> str:
    """Path of layer `number`: "model.layers.3"."""
    under = [path for path in paths if layer_number(path) == number]
    attention = [path for path in under if "attn" in path.lower() or "attention" in path.lower()]
    layers = sorted({_up_to_number(path) for path in attention or under})
    if not layers:
        raise ValueError(f"plan: the model has no layer {number}; it has {_some(paths)}")
    if len(layers) > 1:
        raise ValueError(f"plan: layer {number} is in several stacks: {', '.join(layers)}; name the modules by a pattern")
    return layers[0]


def _up_to_number(path: str) -> str:
    parts = path.split(".")
    return ".".join(parts[: next(i for i, part in enumerate(parts) if part.isdigit()) + 1])


def _some(paths: list[str]) -> str:
    """A few paths for a message, attention first."""
    shown = [p for p in paths if "attn" in p.lower() or "attention" in p.lower()] or [p for p in paths if p]
    return ", ".join(shown[:3]) + (", ..." if len(shown) > 3 else "") if shown else "no modules"
