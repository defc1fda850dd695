"""What a policy is: a frozen, validated dataclass that says which keys a site reads, and by which operators it attends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias, TypeVar

from torch import nn

from tsa_compile.cache.kv_state import KvState
from tsa_compile.kernels.edges import Edges
from tsa_compile.kernels.types import Selection
from tsa_compile.passes.site import AttentionSite

T = TypeVar("T")
Emit: TypeAlias = Callable[..., Any]  # emit(operator, *args, **kwargs): a node of a graph, or the operator's result
_REGISTRY: dict[str, type[Policy]] = {}


class Policy:
    """Base of all policies. A subclass is a frozen dataclass in a file of its own under `tsa_compile/policies/`.

    The passes know only what stands here; a new policy changes no pass and no other policy. `select` and `attend` run in a graph
    and outside of one alike: they call registered operators through `emit`, and nothing else, on the tensors or nodes of
    `site.operands`. `emit` returns what the operator does: one result, or a tuple of as many as its schema has.
    """

    name: ClassVar[str]
    masks: ClassVar[frozenset[str]] = frozenset({"causal"})  # the kinds (`MaskFacts.kind`) that it takes
    phases: ClassVar[frozenset[str]] = frozenset({"prefill"})  # those of `site.PHASES` that it is for
    min_queries: int = 128  # prefill: so few query rows over a cache are left to the model
    reads_blocks: ClassVar[bool] = False  # do the operators take keys that lie in blocks anywhere (`KvView.blocks`)?
    needs_session: ClassVar[bool] = False  # does it need what `tsa.transform` does around calls, such as the cache that it keeps?
    by_rows: ClassVar[bool] = False  # do the operators see to `min_queries` where only they know the number of rows?
    by_length: ClassVar[bool] = False  # do they take `site.dense_below`?

    @property
    def computes(self) -> frozenset[str]:
        """What else its operators do to scores: "softcap", "sinks"."""
        return frozenset()

    @property
    def shareable(self) -> bool:
        """Is what `select` gives right at any site with the same sizes and mask (`Plan.reuse`)?"""
        return False

    def __init_subclass__(cls, abstract: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = cls.__name__
        if not abstract:  # what several policies share is none itself
            _REGISTRY[cls.name] = cls

    def refuse(self, site: AttentionSite) -> str | None:
        """Why this policy leaves `site` as it is, or None if it takes it. Reads facts only: there are no operands yet."""
        raise NotImplementedError

    def reads_projected(self, site: AttentionSite) -> bool:
        """Does `select` at this site go by keys before their rotation, which the cache keeps projected (`ProjectedKeys`)?"""
        return False

    def states(self) -> tuple[KvState, ...]:
        """What the cache keeps for this policy beside each layer's keys and values."""
        return ()

    def keeping(self, model: nn.Module | None = None) -> Any:
        """How the cache keeps rows beside the buffers that a decode step reads, compared by value; None: these hold every row.
        `model`: whose learned indexes it may go by."""
        return None

    def remark(self, site: AttentionSite) -> str:
        """What the report says of a site that the policy takes; nothing, as a rule."""
        return ""

    def kernel_lengths(self) -> tuple[int, ...]:
        """Keys up to which other kernels run than beyond: what a warm-up asks. A selection's own chunks are not named here."""
        return ()

    def select(self, emit: Emit, site: AttentionSite, state: Any) -> Selection | None:
        """Which keys each query reads; None: all, or `attend` chooses as it goes.

        Args:
            emit: how operators are called.
            site: what is attended.
            state: the tensors of the policy's state by name, where the cache keeps it; None: it does not.
        """
        return None

    def attend(self, emit: Emit, site: AttentionSite, selection: Selection | None) -> Any:
        """The attention `[B, H, Lq, Dv]` to the keys of `selection`, which may be another site's of the same sizes."""
        raise NotImplementedError

    def guaranteed(self, site: AttentionSite) -> Edges:
        """Which keys before it each row of `site` reads whatever the data are, where the policy takes the site.

        A selection that depends on data may be empty, so only its fixed part counts: windows, blocks, bridges. First tokens that
        every row reads are left out: they read nothing that lies between, so they relay nothing (`tsa.reach`).
        """
        return Edges.none()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict: the policy's name under "policy", then its fields. `from_dict` is its inverse."""
        return {"policy": self.name, **dataclasses.asdict(self)}  # type: ignore[call-overload]

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> Policy:
        return build(cls, fields)


def call(operator: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The `emit` of eager code: calls the operator."""
    return operator(*args, **kwargs)


def own_edges(site: AttentionSite) -> Edges:
    """What the model's own attention reads; nothing is certain of a mask that was not proven."""
    if site.mask.causal:
        return Edges.every() if site.mask.window is None else Edges.window(site.mask.window)
    return Edges.every() if site.obstacle is None and site.mask.unproven is None else Edges.none()


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
