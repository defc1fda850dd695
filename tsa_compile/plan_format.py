"""A plan as JSON: format 2 is written, formats 1 and 2 are read.

```json
{"format": "tsa_compile.plan", "version": 2, "phases": {"prefill": {"policy": "TokenSparse", "coverage": 0.1}},
 "rules": [{"modules": "model.layers.[0-1].*", "phase": "prefill", "policy": {"policy": "Dense"}}],
 "reuse": null, "where": "always", "notes": {}}
```
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tsa_compile.passes.site import PHASES
from tsa_compile.policies.base import Policy, from_dict
from tsa_compile.policies.dense import Dense
from tsa_compile.rules import Rule

if TYPE_CHECKING:
    from tsa_compile.plan import Plan

NAME = "tsa_compile.plan"
VERSION = 2
_FIELDS = {1: ("default", "layers", "notes"), 2: ("phases", "rules", "reuse", "where", "notes", "weights")}


def write(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values."""
    named = {phase: getattr(plan, phase) for phase in PHASES}
    return {
        "format": NAME,
        "version": VERSION,
        "phases": {phase: policy.to_dict() for phase, policy in named.items() if policy is not None},
        "rules": [{"modules": r.modules, "phase": r.phase, "policy": r.policy.to_dict()} for r in plan.rules],
        "reuse": None if plan.reuse is None else [entry.to_dict() for entry in plan.reuse],
        "where": plan.where,
        "notes": dict(plan.notes),
        **({} if plan.weights is None else {"weights": plan.weights}),
    }


def read(data: Any) -> dict[str, Any]:
    """The arguments of `Plan` that a file of either format says.

    Raises:
        ValueError, TypeError: it is no plan; the message names the field.
    """
    fields = dict(_mapping("plan", data))
    if fields.pop("format", None) != NAME:
        raise ValueError(f'not a tsa_compile plan: no "format": "{NAME}"')
    version = fields.pop("version", None)
    if type(version) is not int or version not in _FIELDS:
        raise ValueError(f"plan format version {version!r}; this release reads {', '.join(map(str, _FIELDS))}")
    _known("plan", fields, _FIELDS[version])
    return _read_1(fields) if version == 1 else _read_2(fields)


def _read_2(fields: dict[str, Any]) -> dict[str, Any]:
    phases = _mapping("phases", fields.pop("phases", {}))
    _known("phases", phases, PHASES)
    found = {phase: _policy(f"phases.{phase}", policy) for phase, policy in phases.items()}
    rules = fields.pop("rules", [])
    if not isinstance(rules, list):
        raise TypeError(f"rules must be a list, got {type(rules).__name__}")
    return {**fields, **found, "rules": tuple(_rule(f"rules[{n}]", r) for n, r in enumerate(rules))}


def _rule(field: str, data: Any) -> tuple[Any, Any, Policy]:
    given = _mapping(field, data)
    _known(field, given, ("modules", "phase", "policy"))
    return given.get("modules"), given.get("phase"), _policy(f"{field}.policy", given.get("policy"))


def _read_1(fields: dict[str, Any]) -> dict[str, Any]:
    """Format 1: a prefill policy, exceptions by layer number, and policies that name the layers that they are for."""
    layers = _mapping("layers", fields.pop("layers", {}))
    wrong = [key for key in layers if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10)]
    if wrong:
        raise ValueError(f"layers must be numbered, got {wrong[0]!r}")
    exceptions = {int(key): _policy_1(f"layers.{key}", policy) for key, policy in layers.items()}
    default, only = _policy_1("default", fields.pop("default", None))
    rules = [Rule(n, "prefill", p if among is None or n in among else Dense()) for n, (p, among) in sorted(exceptions.items())]
    if only is not None:
        rules += [Rule(n, "prefill", default) for n in only if n not in exceptions]
        default = Dense()
    return {**fields, "prefill": default, "rules": tuple(rules)}


def _policy_1(field: str, data: Any) -> tuple[Policy, list[int] | None]:
    """(the policy, the layers it names); what a TokenSparse of format 1 does not say is the paper's setting."""
    given = dict(_mapping(field, data))
    layers = None
    if given.get("policy") == "TokenSparse":
        layers = given.pop("layers", None)
        given = {"coverage": 0.005, "completion": None, **given}
    if layers is not None and not (isinstance(layers, list) and all(type(n) is int and n >= 0 for n in layers)):
        raise ValueError(f"{field}.layers must be null or a list of numbers, got {layers!r}")
    return _policy(field, given), layers


def _policy(field: str, data: Any) -> Policy:
    try:
        return from_dict(dict(_mapping(field, data)))
    except (ValueError, TypeError) as error:
        raise type(error)(f"{field}: {error}") from error


def _mapping(field: str, data: Any) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise TypeError(f"{field} must be an object, got {type(data).__name__}")
    return data


def _known(field: str, given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    unknown = sorted(map(str, set(given) - set(known)))
    if unknown:
        raise ValueError(f"{field} has no field {unknown[0]!r}; its fields are {list(known)}")
