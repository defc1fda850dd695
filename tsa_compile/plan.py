"""A plan says which policy each layer gets; it is what `calibrate` writes, `transform` applies and exports embed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsa_compile.policies.base import Policy, from_dict
from tsa_compile.policies.token_sparse import Completion, TokenSparse

if TYPE_CHECKING:
    from tsa_compile.passes.site import AttentionSite

FORMAT_VERSION = 1
DEFAULT_COVERAGE = 0.05


@dataclasses.dataclass(frozen=True)
class Plan:
    """Layer -> policy.

    Args:
        default: the policy of every layer that `layers` does not name.
        layers: exceptions, by layer number (`AttentionSite.layer`).
        notes: what is known about the plan, such as the loss it was accepted at; JSON values only.
    """

    default: Policy
    layers: Mapping[int, Policy] = dataclasses.field(default_factory=dict)
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def policy_for(self, site: AttentionSite) -> Policy:
        return self.policy_for_layer(site.layer)

    def policy_for_layer(self, layer: int) -> Policy:
        return self.layers.get(layer, self.default)

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": "tsa_compile.plan",
            "version": FORMAT_VERSION,
            "default": self.default.to_dict(),
            "layers": {str(i): p.to_dict() for i, p in sorted(self.layers.items())},
            "notes": dict(self.notes),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that `to_dict` wrote.

        Raises:
            ValueError: not a plan, a newer format, or a policy that does not validate.
        """
        if data.get("format") != "tsa_compile.plan":
            raise ValueError('not a tsa_compile plan: no "format": "tsa_compile.plan"')
        if data.get("version") != FORMAT_VERSION:
            raise ValueError(f"plan format version {data.get('version')!r}; this release reads {FORMAT_VERSION}")
        layers = {int(i): from_dict(p) for i, p in data.get("layers", {}).items()}
        return cls(from_dict(data["default"]), layers, data.get("notes", {}))

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        return cls.from_dict(json.loads(Path(path).read_text()))


def as_plan(policy_or_plan: Policy | Plan | Mapping[str, Any] | None) -> Plan:
    """A plan from what users pass: None (`default_policy()`), a policy, a plan, or either as a dict.

    Raises:
        TypeError: anything else.
    """
    if policy_or_plan is None:
        return Plan(default_policy())
    if isinstance(policy_or_plan, Plan):
        return policy_or_plan
    if isinstance(policy_or_plan, Policy):
        return Plan(policy_or_plan)
    if isinstance(policy_or_plan, Mapping):
        return Plan.from_dict(policy_or_plan) if "format" in policy_or_plan else Plan(from_dict(dict(policy_or_plan)))
    raise TypeError(f"expected a policy, a plan, a dict of either, or None; got {type(policy_or_plan).__name__}")


def default_policy(coverage: float | None = None) -> TokenSparse:
    """The policy of `transform(model)`: token-sparse, with a completion strip for the rows that are not selected."""
    return TokenSparse(coverage=DEFAULT_COVERAGE if coverage is None else coverage, completion=Completion())
