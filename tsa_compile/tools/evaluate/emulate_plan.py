"""Thresholds by layer and head: where an error hurts less, fewer pairs are read. Fitted on one text, to be judged on others."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from tsa_compile.tools.evaluate.emulate_attention import masked_attention
from tsa_compile.tools.evaluate.emulate_blocks import BlockMask, BlockRule
from tsa_compile.tools.evaluate.emulate_fit import Levels, by_error
from tsa_compile.tools.evaluate.emulate_levels import levels
from tsa_compile.tools.evaluate.emulate_model import Layer, dense
from tsa_compile.tools.evaluate.emulate_prefill import ROWS, Reference, run_rule

Tensor = torch.Tensor
Table = list[dict[int, Tensor]]  # for each threshold, by layer: [H]


def head_errors(reference: Reference, rule: BlockRule, thresholds: Sequence[float]) -> tuple[Table, Table]:
    """(errors, pairs) of every head at every threshold, each layer alone, along one dense run.

    The error is what the head changes in the projected output, squared, over that output's square: a head counts by what the
    rest of the model sees of it.
    """
    errors: Table = [{} for _ in thresholds]
    pairs: Table = [{} for _ in thresholds]

    def attend(layer: Layer) -> Tensor:
        exact = dense(layer)
        if layer.window is None and layer.index not in rule.dense_layers:
            level, tokens = levels(rule, layer), rule.tokens(layer)
            for at, error, read in zip(thresholds, errors, pairs, strict=True):
                out, read[layer.index] = masked_attention(layer, BlockMask(rule, layer, level >= at, tokens))
                error[layer.index] = _projected_error(layer, out, exact)
        return exact

    reference.emulator.run(reference.ids, attend)
    return errors, pairs


def _projected_error(layer: Layer, out: Tensor, exact: Tensor) -> Tensor:
    """[H]: squared norm of W_o's part for the head times the difference, over the squared norm of the whole projected output."""
    weight = layer.output.float().unflatten(1, (out.shape[0], -1))  # [width, H, Dv]
    whole = (exact.float().transpose(0, 1).flatten(1) @ layer.output.float().T).square().sum()
    parts = [((o - e.float()) @ weight[:, h].T).square().sum() for h, (o, e) in enumerate(zip(out, exact, strict=True))]
    return torch.stack(parts) / whole


def layer_costs(reference: Reference, rule: BlockRule, threshold: float, layers: Sequence[int]) -> dict[int, float]:
    """Divergence in nats, of the last and the middle predictions, when one layer alone is sparse."""
    length = reference.ids.shape[0]
    tail, middle = length - rule.last_dense, (length + ROWS) // 2
    costs = {}
    for i in layers:
        hidden = run_rule(reference.emulator, reference.ids, rule, threshold, only=i).hidden
        kl = [reference.divergence(hidden, slice(stop - ROWS, stop))[0].mean().item() for stop in (tail, middle)]
        costs[i] = sum(kl) / len(kl)
    return costs


@dataclasses.dataclass(frozen=True)
class Candidates:
    """What `fit` chooses from.

    Args:
        thresholds: tried on every head. errors, pairs: of every head at each of them.
        layer_cost: divergence when that layer alone is sparse at thresholds[measured]; None: all layers count alike.
    """

    thresholds: Sequence[float]
    errors: Table
    pairs: Table
    layer_cost: dict[int, float] | None = None
    measured: int = 0

    def fit(self, found: Levels, share: float) -> dict[int, Tensor]:
        """{layer: threshold [H]} that read at most `share` of the pairs."""
        always = found.pairs - sum(w.shape[0] for w in found.weight.values()) * (found.pairs // found.heads)  # dense layers
        weight = {i: 1.0 for i in self.errors[0]}
        if self.layer_cost is not None:
            weight = {
                i: max(c, 0.0) / float(self.errors[self.measured][i].sum().clamp_min(1e-12)) for i, c in self.layer_cost.items()
            }
        costs = [{i: e * weight[i] for i, e in table.items()} for table in self.errors]
        return by_error(costs, self.pairs, self.thresholds, share * found.pairs - always)
