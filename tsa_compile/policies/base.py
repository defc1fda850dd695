"""What a policy is: a frozen, validated dataclass that says which keys a site reads, and by which operators it attends."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from torch import nn

from tsa_compile.cache.kv_state import KvState
from tsa_compile.kernels.checks import MAX_HEAD_DIM
from tsa_compile.kernels.edges import Edges
from tsa_compile.kernels.types import Selection
from tsa_compile.passes.site import VERIFY_ROWS, AttentionSite

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


_KINDS = {
    "causal": "causal mask: {policy} is for {masks} attention",
    "bidirectional": "bidirectional: no causal mask",
    "sliding window": "sliding window of {window}: already local",
}


def why_dense(policy: Policy, site: AttentionSite) -> str | None:
    """Why `site` stays as it is under `policy`; None: it is replaced. The one question that graphs and eager code ask."""
    if site.phase not in policy.phases:
        return f"{step(site)}: {policy.name} is for {' and '.join(sorted(policy.phases))}"
    if site.obstacle is not None:
        return site.obstacle
    if site.softcap and "softcap" not in policy.computes:
        return "softcap: scores go through tanh"
    if site.sinks and "sinks" not in policy.computes:
        return "attention sinks: columns that are no keys take part in the softmax"
    mask = site.mask
    if mask.unproven is not None and mask.kind not in policy.masks:
        return mask.unproven
    if mask.kind not in policy.masks:
        return _KINDS[mask.kind].format(policy=policy.name, masks=" or ".join(sorted(policy.masks)), window=mask.window)
    return policy.refuse(site) or cannot_run(site) or _too_few_rows(policy, site)


def where_it_pays(policy: Policy, site: AttentionSite, pays_from: int | None) -> tuple[AttentionSite, str | None]:
    """The site as its policy is to take it, and `why_dense`, if it is to run with `pays_from` keys and more alone.

    Args:
        policy: of the site.
        site: the site.
        pays_from: 0: with any number; None: with none.
    """
    reason = why_dense(policy, site)
    if reason is not None or pays_from == 0:
        return site, reason
    if pays_from is None:
        return site, f"dense: {policy.name} was slower at every length measured on this GPU"
    if isinstance(site.k_len, int) and site.k_len < pays_from:
        return site, f"dense below {pays_from} tokens: {policy.name} does not pay here"
    return (dataclasses.replace(site, dense_below=pays_from) if policy.by_length else site), None


def edges_of(policy: Policy, site: AttentionSite) -> Edges:
    """What each row of `site` reads for certain under `policy`, or by the model's own attention where that leaves it dense."""
    return own_edges(site) if why_dense(policy, site) is not None else policy.guaranteed(site)


def own_edges(site: AttentionSite) -> Edges:
    """What the model's own attention reads; nothing is certain of a mask that was not proven."""
    if site.mask.causal:
        return Edges.every() if site.mask.window is None else Edges.window(site.mask.window)
    return Edges.every() if site.obstacle is None and site.mask.unproven is None else Edges.none()


def step(site: AttentionSite) -> str:
    """The phase in words, such as "decode step: one query"."""
    words = {"decode": "decode step: one query", "verify": f"verify step: {site.q_len} queries over a cache"}
    return words.get(site.phase, site.phase)


def _too_few_rows(policy: Policy, site: AttentionSite) -> str | None:
    if site.phase != "prefill" or not site.past or not site.mask.causal:
        return None
    if isinstance(site.q_len, int):
        few = site.q_len <= policy.min_queries
        return f"{site.q_len} queries over a cache: {policy.name} is for more than {policy.min_queries}" if few else None
    return None if policy.by_rows else f"queries over a cache in a number that varies, and {policy.name} is for more than a few"


def note(policy: Policy, site: AttentionSite) -> str:
    """What else the report says of a replaced site."""
    varies = site.phase == "prefill" and site.past and site.mask.causal and not isinstance(site.q_len, int)
    rows = f"dense for up to {max(policy.min_queries, VERIFY_ROWS)} queries over a cache" if varies else ""
    length = f"dense below {site.dense_below} tokens: does not pay here" if site.dense_below else ""
    return "; ".join(filter(None, (length, rows, policy.remark(site))))


def cannot_run(site: AttentionSite) -> str | None:
    """What no kernel of ours computes, on the site's device: dtype, head dims, the device itself. None: nothing."""
    for name, size in (("head dim", site.head_dim), ("value head dim", site.v_head_dim)):
        if not isinstance(size, int):
            return f"{name} {size} varies between runs"
        if size > MAX_HEAD_DIM:
            return f"{name} {size} is above {MAX_HEAD_DIM}"
    device = site.device
    if device.type in ("cpu", "meta"):
        return None
    if device.type != "cuda":
        return f"device {device.type}: the operators run on cpu and cuda"
    if site.dtype == torch.float64:
        return "float64 on cuda: the kernels compute in float16, bfloat16 and float32"
    if torch.version.hip is not None:
        return "ROCm: the kernels are for NVIDIA GPUs"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: the kernels need it on cuda"
    if torch.cuda.is_available():  # fake tensors of a traced graph may name a device that is not there
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"compute capability {major}.{minor}: the kernels need 8.0"
    return None


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
