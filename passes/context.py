"""What passes hand on to each other, and what they leave in the end."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import torch
import torch.fx as fx

from tsa_compile.cache.kv_state import KvSize, KvState
from tsa_compile.passes.facts.graph_facts import GraphFacts
from tsa_compile.passes.find.match import Match
from tsa_compile.passes.find.rope import Rotations
from tsa_compile.passes.prove_mask.patterns import Pattern
from tsa_compile.passes.prove_mask.proven import HeadTerm, ProvenMask
from tsa_compile.passes.site import AttentionSite, Route
from tsa_compile.policies.base import Policy
from tsa_compile.policies.why_dense import note


@dataclasses.dataclass(frozen=True, eq=False)
class GraphSite:
    """An attention site with what only its graph needs.

    Args:
        match: the nodes; K and V before their repetition for grouped queries.
        mask: what was proven about the mask, with the nodes that hide keys.
        site: what policies, plans and reports know.
        sinks: where the sinks of each head stand.
    """

    match: Match
    mask: ProvenMask
    site: AttentionSite
    sinks: HeadTerm | None = None

    @property
    def node(self) -> fx.Node:
        """The output; a rewrite replaces it."""
        return self.match.node

    def __str__(self) -> str:
        return f"site {self.site.index} ({self.site.module or self.node.name})"


@dataclasses.dataclass(frozen=True)
class KeptCache:
    """A static cache among the graph's inputs, and inputs behind all others for what a policy keeps beside it.

    Args:
        keys, values: the names of the inputs that are its buffers, `[B, Hk, capacity, D]` and `[B, Hk, capacity, Dv]`.
        size: theirs.
        kinds: what is kept.
        inputs: the tensors of the kinds, by the names of kind and field.
        begin, end: int32 `[B]`, the rows of the page that holds the step's new row; equal where that page can never be full.
    """

    keys: str
    values: str
    size: KvSize
    kinds: tuple[KvState, ...]
    inputs: Mapping[tuple[str, str], fx.Node]
    begin: fx.Node
    end: fx.Node


@dataclasses.dataclass(frozen=True)
class Decision:
    """A site, its policy, and the reason why it stays dense; None: it is replaced.

    Args:
        anchor: the decision whose selection it takes; None: its policy selects.
        heads: as `Route` has it.
        kept: what its policy keeps beside the model's own static cache; None: nothing.
        remark: what the report says of the cache.
    """

    at: GraphSite
    policy: Policy
    reason: str | None
    anchor: Decision | None = None
    heads: tuple[int, ...] | None = None
    kept: KeptCache | None = None
    remark: str = ""

    @property
    def site(self) -> AttentionSite:
        return self.at.site

    @property
    def note(self) -> str:
        """What else there is to say of a replaced site."""
        shared = "" if self.anchor is None else f"selection of {self.anchor.site.module or self.anchor.at.node.name}"
        return "; ".join(filter(None, (note(self.policy, self.site), shared, self.remark)))


@dataclasses.dataclass(frozen=True)
class Replacement:
    """What a site became: the node that took its place, all new nodes, and the tensors of its state, which they may write."""

    at: GraphSite
    new: fx.Node
    created: list[fx.Node]
    state: frozenset[fx.Node] = frozenset()


@dataclasses.dataclass
class Context:
    """The graph and what each pass leaves for the next."""

    gm: fx.GraphModule
    policy_for: Callable[[AttentionSite], Policy]
    constants: Mapping[str, torch.Tensor]
    drafting: bool = False
    route_for: Callable[[AttentionSite], Route | None] = lambda site: None
    pays_from: Callable[[Policy, AttentionSite], int | None] = lambda policy, site: 0
    keeps: bool = False
    sites: list[GraphSite] = dataclasses.field(default_factory=list)
    patterns: dict[str, Pattern] = dataclasses.field(default_factory=dict)
    decisions: list[Decision] = dataclasses.field(default_factory=list)
    replacements: list[Replacement] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    caches: list[KeptCache] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def facts(self) -> GraphFacts:
        """Of the graph as it is when `find_attention` first asks."""
        return GraphFacts(self.gm.graph)

    @functools.cached_property
    def rotations(self) -> Rotations:
        """How queries and keys are rotated, in the graph as it is when somebody first asks."""
        return Rotations(self.gm, self.constants)


@dataclasses.dataclass(frozen=True)
class PipelineResult:
    """What the passes did: a decision for each site, and a count and a time for each pass.

    Args:
        patterns: what the result assumes of the constants that were read, by placeholder name.
        caches: static caches for which the graph has further inputs, in their order.
    """

    decisions: list[Decision]
    patterns: dict[str, Pattern]
    warnings: list[str]
    counts: dict[str, int]
    seconds: dict[str, float]
    caches: list[KeptCache]
