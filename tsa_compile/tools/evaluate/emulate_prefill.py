"""What a prefill rule costs on one text: pairs read, divergence from dense, perplexity, error of the attention's output."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F

from tsa_compile.tools.evaluate.emulate_attention import Mask, causal_pairs, masked_attention
from tsa_compile.tools.evaluate.emulate_blocks import BlockMask, BlockRule, TokenMask
from tsa_compile.tools.evaluate.emulate_fit import Threshold
from tsa_compile.tools.evaluate.emulate_levels import levels
from tsa_compile.tools.evaluate.emulate_model import Emulator, Layer, dense

Tensor = torch.Tensor
ROWS = 128  # of each stretch whose predictions are compared
_POSITIONS = 2048  # whose logits exist at a time


@dataclasses.dataclass(frozen=True)
class CompletedRule:
    """`TokenSparse` with its completion strip: the default plan's, at `coverage`."""

    coverage: float = 0.05
    window: int = 256
    sinks: int = 4
    heavy: int = 256
    last_dense: int = 0
    dense_layers: tuple[int, ...] = ()


Rule = BlockRule | CompletedRule
Row = dict[str, Any]


@dataclasses.dataclass
class Run:
    """Hidden states of a sparse run [L, width]; pairs read and error of the output by layer, {layer: [H]}."""

    hidden: Tensor
    pairs: dict[int, Tensor]
    error: dict[int, Tensor]
    possible: int

    def share(self) -> float:
        """Share of the causal pairs that the global layers' heads read."""
        return float(sum(p.double().mean() for p in self.pairs.values())) / (self.possible * len(self.pairs))


def mask_of(rule: Rule, threshold: Threshold, layer: Layer) -> Mask:
    """The rule on one layer; a block is read if its level is `threshold` or more."""
    if isinstance(rule, CompletedRule):
        return TokenMask(layer, rule.coverage, rule.window, rule.sinks, rule.heavy)
    at = threshold[layer.index][:, None, None] if isinstance(threshold, dict) else threshold
    return BlockMask(rule, layer, levels(rule, layer) >= at, rule.tokens(layer))


def run_rule(emulator: Emulator, ids: Tensor, rule: Rule, threshold: Threshold, only: int | None = None) -> Run:
    """One prefill of ids [L] under the rule; `only`: in that layer alone."""
    found = Run(ids, {}, {}, causal_pairs(ids.shape[0]))

    def attend(layer: Layer) -> Tensor:
        exact = dense(layer)
        if layer.window is not None:
            return exact
        if layer.index in rule.dense_layers or (only is not None and layer.index != only):
            found.pairs[layer.index] = torch.full((layer.q.shape[0],), found.possible, device=exact.device)
            return exact
        out, found.pairs[layer.index] = masked_attention(layer, mask_of(rule, threshold, layer))
        rows = slice(0, out.shape[1] - rule.last_dense)
        found.error[layer.index] = relative_error(out[:, rows], exact[:, rows].float())
        return out

    found.hidden = emulator.run(ids, attend)
    return found


def relative_error(out: Tensor, exact: Tensor) -> Tensor:
    """Norm of the difference over the norm, of each head: [H, n, D] -> [H]."""
    return (out - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2)).clamp_min(1e-30)


class Reference:
    """A text and its dense run, to compare with."""

    def __init__(self, emulator: Emulator, ids: Tensor) -> None:
        if ids.shape[0] < 4 * ROWS:
            raise ValueError(f"a text must have at least {4 * ROWS} tokens, got {ids.shape[0]}")
        self.emulator, self.ids = emulator, ids.to(emulator.device)
        self._hidden = emulator.run(self.ids, dense)
        self.perplexity = self._perplexity(self._hidden)

    def compare(self, run: Run, last_dense: int) -> Row:
        """Divergence of the last predictions ("last"), of the last that the rule did not make dense ("tail"), of those in the
        middle ("mid"), in nats; error of the attention's output over the rows that are not dense."""
        end, middle = self.ids.shape[0], self.ids.shape[0] // 2
        tail = end - last_dense
        row: Row = {"pairs": run.share(), "perplexity": self._perplexity(run.hidden), "dense_perplexity": self.perplexity}
        for name, stop in (("last", end), ("tail", tail), ("mid", middle + ROWS // 2)):
            kl, same = self.divergence(run.hidden, slice(stop - ROWS, stop))
            row |= {f"kl_{name}": kl.mean().item(), f"worst_{name}": kl.max().item(), f"top1_{name}": same.float().mean().item()}
        layers = {i: e.mean().item() for i, e in run.error.items()}
        if layers:
            heads = torch.stack(list(run.error.values()))
            row |= {"error": heads.mean().item(), "worst_head": heads.max().item()}
            row |= {"worst_layer": max(layers.values()), "error_by_layer": {str(i): round(e, 4) for i, e in layers.items()}}
        shares = {str(i): round(p.double().mean().item() / run.possible, 4) for i, p in run.pairs.items()}
        return row | {"pairs_by_layer": shares}

    def divergence(self, hidden: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """(KL(dense || sparse) in nats, same top token) of each row."""
        return divergence(*(self.emulator.logits(h[rows]) for h in (self._hidden, hidden)))

    def _perplexity(self, hidden: Tensor) -> float:
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for h, target in zip(hidden[:-1].split(_POSITIONS), self.ids[1:].split(_POSITIONS), strict=True):
            total += F.cross_entropy(self.emulator.logits(h), target, reduction="sum").double()
        return math.exp(total.item() / (self.ids.shape[0] - 1))


def divergence(exact: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """(KL(exact || other) in nats, same top token) of logits [n, vocabulary]: [n] each."""
    p, q = exact.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1), exact.argmax(-1) == other.argmax(-1)
