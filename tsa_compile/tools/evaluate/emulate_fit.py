"""Thresholds that make rules read the same number of pairs: one for all layers, or one for each layer and head."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from tsa_compile.tools.evaluate.emulate_attention import causal_pairs
from tsa_compile.tools.evaluate.emulate_blocks import BlockRule
from tsa_compile.tools.evaluate.emulate_levels import levels
from tsa_compile.tools.evaluate.emulate_model import Emulator, Layer, dense

Tensor = torch.Tensor
Threshold = float | dict[int, Tensor]  # by layer: [H]


@dataclasses.dataclass
class Levels:
    """Levels of the blocks that are free to be left out, of every layer of one text, and the pairs each would add.

    Args:
        level, weight: {layer: [H, N]}.
        pairs: of all heads of all global layers, whose heads are `heads` in all.
    """

    level: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    weight: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    pairs: int = 0
    heads: int = 0

    def base(self) -> float:
        """Pairs that are read whatever the threshold is."""
        return self.pairs - sum(float(w.double().sum()) for w in self.weight.values())

    def threshold(self, share: float) -> float:
        """The lowest threshold at which at most `share` of the pairs are read.

        Raises:
            ValueError: what is always read is more than that.
        """
        room = share * self.pairs - self.base()
        if room < 0:
            raise ValueError(f"the rule always reads {self.base() / self.pairs:.3f} of the pairs, more than {share}")
        level, order = torch.cat([x.flatten() for x in self.level.values()]).sort(descending=True)
        weight = torch.cat([x.flatten() for x in self.weight.values()])[order]
        count = int((weight.double().cumsum(0) <= room).sum())
        if count == level.shape[0]:
            return float(level[-1])
        above = level[level > level[count]]  # of equal levels all are read or none
        return float(above[-1]) if above.shape[0] else math.inf

    def read(self, threshold: Threshold) -> float:
        """Share of the pairs that a threshold reads."""
        more = 0.0
        for i, level in self.level.items():
            at = threshold[i][:, None] if isinstance(threshold, dict) else threshold
            more += float(self.weight[i].double()[level >= at].sum())
        return (self.base() + more) / self.pairs


def collect(emulator: Emulator, ids: Tensor, rule: BlockRule) -> Levels:
    """The levels along a dense run of one text."""
    found = Levels()

    def attend(layer: Layer) -> Tensor:
        if layer.window is None:
            found.heads += layer.q.shape[0]
            found.pairs += layer.q.shape[0] * causal_pairs(layer.k.shape[1])
            if layer.index not in rule.dense_layers:
                found.level[layer.index], found.weight[layer.index] = free_levels(rule, layer)
        return dense(layer)

    emulator.run(ids, attend)
    return found


def free_levels(rule: BlockRule, layer: Layer) -> tuple[Tensor, Tensor]:
    """(levels, pairs) [H, N] of the blocks that are neither forced nor in the row block's future."""
    length, device = layer.k.shape[1], layer.k.device
    free = rule.before(length, device) & ~rule.forced(length, device)
    keys = torch.full((layer.q.shape[0], free.shape[1]), float(rule.keys), device=device)
    tokens = rule.tokens(layer)
    if tokens is not None:  # these are read anyway
        whole = length // rule.keys
        keys[:, :whole] -= tokens[:, : whole * rule.keys].unflatten(1, (whole, rule.keys)).sum(2)
    rows = (length - torch.arange(0, length, rule.rows, device=device)).clamp(max=rule.rows)
    weight = rows[None, :, None] * keys[:, None]
    return levels(rule, layer)[:, free], weight[:, free]


def by_error(
    costs: Sequence[dict[int, Tensor]], reads: Sequence[dict[int, Tensor]], at: Sequence[Threshold], room: float
) -> dict[int, Tensor]:
    """One of several thresholds for each layer and head, so that the summed cost is smallest within `room` pairs.

    Args:
        costs, reads: for each candidate threshold, {layer: [H]}: the error it causes and the pairs it reads.
        at: the candidate thresholds; a number, or numbers by layer and head.
        room: pairs to be read, at most.

    Returns:
        {layer: [H]}, by bisection on the price of a pair.
    """
    layers = list(costs[0])
    cost = torch.stack([torch.cat([c[i].double() for i in layers]) for c in costs])
    read = torch.stack([torch.cat([r[i].double() for i in layers]) for r in reads])
    low, high = 0.0, float(cost.max()) / float(read.min().clamp_min(1.0)) + 1.0
    for _ in range(100):
        price = (low + high) / 2
        chosen = (cost + price * read).argmin(0, keepdim=True)
        low, high = (price, high) if float(read.gather(0, chosen).sum()) > room else (low, price)
    chosen = (cost + high * read).argmin(0)
    heads = [costs[0][i].shape[0] for i in layers]
    values = torch.stack([_flat(t, layers, heads, cost) for t in at]).gather(0, chosen[None])[0]
    return dict(zip(layers, values.float().split(heads), strict=True))


def _flat(threshold: Threshold, layers: list[int], heads: list[int], like: Tensor) -> Tensor:
    if isinstance(threshold, dict):
        return torch.cat([threshold[i] for i in layers]).to(like)
    return torch.full((sum(heads),), threshold, dtype=like.dtype, device=like.device)
