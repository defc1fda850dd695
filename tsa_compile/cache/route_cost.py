"""Whether queries go to the keys, keys come to the queries, or keys are computed anew: what each costs, by measured numbers.

After "Move the Query, Not the Cache" (arXiv 2606.01502), whose model prices one layer's round trip of queries against one fetch
for all layers; here all three are priced for `steps` decode steps, and each with the attention that it needs.
"""

from __future__ import annotations

import dataclasses

WAYS = ("route", "fetch", "recompute")


@dataclasses.dataclass(frozen=True)
class Link:
    """What a process group and its processors take, in seconds unless said otherwise (`tsa-compile tune --distributed`).

    Args:
        probe: an exchange of next to nothing.
        bandwidth: bytes a second of large messages, of one rank.
        attend: attention of one query row to one key, all heads.
        merge: joining what one holder found.
        splice: putting one fetched token of one layer into its place.
        recompute: computing one token of one layer anew; None: not measured, so never chosen.
    """

    probe: float
    bandwidth: float
    attend: float
    merge: float
    splice: float
    recompute: float | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and not (value > 0 if field.name == "bandwidth" else value >= 0):
                raise ValueError(f"Link.{field.name} must be a positive number, got {value!r}")


@dataclasses.dataclass(frozen=True)
class Work:
    """What is asked.

    Args:
        rows: query rows of a step.
        tokens: keys that every row reads.
        holders: ranks among which these are spread evenly; they attend at the same time.
        layers: of the model.
        steps: decode steps that ask.
        reuse: steps after which the keys that are wanted are others, so that they are fetched or computed again; None: never.
        heads, kv_heads, head_dim, itemsize: of the model and its dtype.
        here: of the keys, those that who asks has already: they do not travel.
    """

    rows: int
    tokens: int
    holders: int
    layers: int
    steps: int
    heads: int
    kv_heads: int
    head_dim: int
    itemsize: int = 2
    reuse: int | None = None
    here: int = 0

    @property
    def row_bytes(self) -> int:
        """A row's query and its answer: out and lse."""
        return self.heads * (2 * self.head_dim * self.itemsize + 4)

    @property
    def token_bytes(self) -> int:
        """A token's keys and values in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.itemsize


def seconds(link: Link, work: Work) -> dict[str, float]:
    """What each of `WAYS` takes for all steps and layers; infinite where it was not measured."""
    calls, layer_tokens = work.steps * work.layers, (work.tokens - work.here) * work.layers
    times = 1 if work.reuse is None else -(-work.steps // work.reuse)
    travel = link.probe + work.rows * work.row_bytes / link.bandwidth + work.holders * link.merge
    each_holder = work.rows * -(-work.tokens // work.holders) * link.attend
    here = calls * work.rows * work.tokens * link.attend
    fetch = link.probe + layer_tokens * (work.token_bytes / link.bandwidth + link.splice)
    again = float("inf") if link.recompute is None else layer_tokens * link.recompute
    return {"route": calls * (travel + each_holder), "fetch": times * fetch + here, "recompute": times * again + here}


def cheapest(link: Link, work: Work) -> str:
    """The one of `WAYS` that takes least; of equals the first."""
    costs = seconds(link, work)
    return min(WAYS, key=costs.__getitem__)
