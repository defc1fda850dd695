"""What a policy is: a frozen, validated dataclass that says which tokens a site reads, and lowers itself to operators."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

if TYPE_CHECKING:
    import torch.fx as fx

    from tsa_compile.passes.site import AttentionSite

T = TypeVar("T")
_REGISTRY: dict[str, type[Policy]] = {}


class Policy:
    """Base of all policies. A subclass is a frozen dataclass in a file of its own under `tsa_compile/policies/`.

    The passes know only `masks` and the three methods below; a new policy changes no pass and no other policy.
    """

    name: ClassVar[str]
    masks: ClassVar[frozenset[str]] = frozenset({"causal"})  # the kinds (`MaskFacts.kind`) that it takes
    phases: ClassVar[frozenset[str]] = frozenset({"prefill"})  # those of `site.PHASES` that it is for

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = cls.__name__
        _REGISTRY[cls.name] = cls

    def refuse(self, site: AttentionSite) -> str | None:
        """Why this policy leaves `site` as it is, or None if it takes it."""
        raise NotImplementedError

    def lower(self, graph: fx.Graph, site: AttentionSite) -> fx.Node:
        """Emit the site's replacement at the graph's insertion point; returns the node of its `[B, H, Lq, Dv]` result."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict: the policy's name under "policy", then its fields. `from_dict` is its inverse."""
        return {"policy": self.name, **dataclasses.asdict(self)}  # type: ignore[call-overload]

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> Policy:
        return build(cls, fields)


def from_dict(data: dict[str, Any]) -> Policy:
    """The policy that `Policy.to_dict` wrote.

    Raises:
        ValueError: unknown policy, unknown field, or a value outside a field's range.
    """
    fields = dict(data)
    name = fields.pop("policy", None)
    if not isinstance(name, str) or name not in _REGISTRY:
        raise ValueError(f"unknown policy {name!r}; known: {sorted(_REGISTRY)}")
    return _REGISTRY[name]._from_fields(fields)


def build(cls: type[T], fields: dict[str, Any]) -> T:
    """An instance of the dataclass `cls`; a ValueError names a field it does not have."""
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {unknown[0]!r}; its fields are {sorted(known)}")
    return cls(**fields)


def check_int(owner: object, field: str, low: int, high: int | None = None) -> None:
    """Raise a ValueError naming the field, its value and the allowed range, unless it is an int in [low, high]."""
    value = getattr(owner, field)
    upper = "" if high is None else f" and <= {high}"
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise ValueError(f"{type(owner).__name__}.{field} must be an int >= {low}{upper}, got {value!r}")


def check_share(owner: object, field: str) -> None:
    """Raise a ValueError naming the field, its value and the allowed range, unless it is a number in [0, 1)."""
    value = getattr(owner, field)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{type(owner).__name__}.{field} must be a number in [0, 1), got {value!r}")
