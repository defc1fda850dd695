"""Do queries go to the keys of a spread cache, or do keys come? Decided on the host, once for a prompt, by `route_cost.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from tsa_compile.cache.route_cost import WAYS, Link, Work, cheapest
from tsa_compile.kernels.common.group import number_of_each


class RouteRule(NamedTuple):
    """What is known beforehand.

    Args:
        link: measured numbers, the same on every rank.
        steps: decode steps that a request is expected to take.
        group: query heads of a KV head.
    """

    link: Link
    steps: int
    group: int


def decide(layers: Sequence[Any], rows: int, holders: int) -> None:
    """Before a step of so many query rows: all ranks fetch every key of `layers`, if that is cheaper than to route queries.

    Nothing where no rule is known, and until the rows change nothing once it was decided. The host waits for the group once.

    Args:
        layers: `SpreadMethods`, of one cache.
        holders: ranks that attend for these rows at the same time.

    Raises:
        ValueError: the ranks come to different decisions; on every rank.
        GroupError: a rank has ended, or takes no part.
    """
    first = layers[0]
    rule, shard = first.kept.rule, first.kept
    if rule is None or first.way is not None or not first.total:
        return
    keys = first.settled().keys
    sizes = (keys.shape[1] * rule.group, keys.shape[1], keys.shape[3], keys.element_size())
    work = Work(rows, first.total, holders, len(layers), rule.steps, *sizes, here=first.total // shard.ranks)
    way = cheapest(rule.link, work)
    number_of_each("a decode step of Routed", {"the cheapest way": WAYS.index(way)}, 0, keys.device, shard.group)
    for layer in layers:
        layer.take(way)
