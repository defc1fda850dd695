"""What a decode rule costs on one text: the last positions, each by its own pages, after a dense prefill."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from tsa_compile.policies.page_sparse import AHEAD
from tsa_compile.tools.evaluate.emulate_model import Emulator, Layer, dense
from tsa_compile.tools.evaluate.emulate_outcome import Choice, Seen, exact_output, mean_masses, outcome
from tsa_compile.tools.evaluate.emulate_pages import PAGE, Index, Stored, build, rotate
from tsa_compile.tools.evaluate.emulate_prefill import divergence
from tsa_compile.tools.evaluate.emulate_select import Budget, DecodeRule, Pages, choose, masses, shares

Tensor = torch.Tensor
ROWS = 128
_TURNED = ("prerope", "unbiased", "unbiased_variance")


class DecodeText:
    """A text whose last 128 positions are decoded; keys and values before them come from a dense prefill.

    Raises:
        ValueError: the length is no multiple of 16, or too short.
    """

    def __init__(self, emulator: Emulator, ids: Tensor) -> None:
        if ids.shape[0] % PAGE or ids.shape[0] < 4 * ROWS:
            raise ValueError(f"a text must have a multiple of {PAGE} tokens, at least {4 * ROWS}, got {ids.shape[0]}")
        self.emulator, self.ids, self.length = emulator, ids.to(emulator.device), ids.shape[0]
        self._prefix: dict[int, Layer] = {}
        emulator.run(self.ids[:-ROWS], self._store)
        self._bias: dict[int, Tensor] = {}
        self._stored: dict[tuple[Index, int], Stored] = {}
        self.exact = self.decode(lambda layer, local: exact_output(layer))

    def run(self, rule: DecodeRule, budget: Budget) -> dict[str, Any]:
        """Decode under the rule; divergence in nats by position, and what the layers showed."""
        seen: dict[int, Seen] = {}
        lists: Tensor | None = None  # of the last layer that selected

        def attend(layer: Layer, local: bool) -> Tensor:
            nonlocal lists
            if local or layer.index in rule.dense_layers:
                return exact_output(layer)
            choice = self.choice(layer, rule, budget, lists if len(seen) % rule.anchors else None)
            lists = choice.chosen
            out, seen[layer.index] = outcome(layer, choice)
            return out

        logits = self.decode(attend)
        kl, same = divergence(self.exact, logits)
        row: dict[str, Any] = {"kl": kl.mean().item(), "worst": kl.max().item(), "top1": same.float().mean().item()}
        row |= _summary(seen, sum(layer.window is None for layer in self._prefix.values()))
        dim = next(iter(self._prefix.values())).q.shape[-1]
        return row | {"bytes_per_key": rule.bytes_per_key(dim), "kl_by_position": [round(x, 5) for x in kl.tolist()]}

    def choice(self, layer: Layer, rule: DecodeRule, budget: Budget, lists: Tensor | None = None) -> Choice:
        """What one layer with all its keys reads; `lists`: bool [Hk, n, P], another layer's pages to read."""
        heads = layer.k.shape[0]
        pages = Pages.of(rule, self.length, layer.q.shape[1], layer.k.device)
        if lists is not None and lists.shape[0] == heads:
            return Choice(lists, pages)
        of_head = budget[layer.index] if isinstance(budget, dict) else torch.full((heads,), budget, device=layer.k.device)
        read = [0.0] * heads if rule.by_mass else of_head.tolist()
        mass = [self.masses(layer, rule.index, g, pages, read[g]) for g in range(heads)]
        chosen = torch.stack([choose(rule, shares(m, pages), pages, of_head[g]) for g, m in enumerate(mass)])
        if not rule.completion:
            return Choice(chosen, pages)
        rest = mass if rule.completion == "index" else [mean_masses(layer, g) for g in range(heads)]
        return Choice(chosen, pages, torch.stack(rest))

    def masses(self, layer: Layer, index: Index, group: int, pages: Pages, keep: float = 0.0) -> Tensor:
        """Estimated log masses [G, n, P] of one KV head's pages, of which the share `keep` is read."""
        stored = self._index(layer, index)
        means = self._index(layer, Index("mean")) if index.first < 1.0 else None
        q = layer.q[group * layer.group : (group + 1) * layer.group]
        one = {name: x[group] for name, x in stored.items()}
        first = max(index.first, min(1.0, AHEAD * keep))
        return masses(index, one, means and {n: x[group] for n, x in means.items()}, q, layer.scale, pages, first)

    def forget(self) -> None:
        """Free the indexes."""
        self._stored.clear()

    def layers(self) -> list[int]:
        """The global layers."""
        return [i for i, layer in self._prefix.items() if layer.window is None]

    def equal(self, keep: float) -> dict[int, Tensor]:
        """One share for every KV head of the global layers: {layer: [Hk]}."""
        layers = {i: self._prefix[i].k for i in self.layers()}
        return {i: torch.full((k.shape[0],), keep, device=k.device) for i, k in layers.items()}

    def decode(self, attend: Callable[[Layer, bool], Tensor]) -> Tensor:
        """Logits [128, vocabulary]; `attend(layer, local)` gets layers whose k and v hold all positions."""

        def whole(layer: Layer) -> Tensor:
            before = self._prefix[layer.index]
            rotation = None
            if layer.rotation is not None and before.rotation is not None:
                (cos, sin), (more_cos, more_sin) = before.rotation, layer.rotation
                rotation = torch.cat((cos, more_cos)), torch.cat((sin, more_sin))
            k, v = torch.cat((before.k, layer.k), 1), torch.cat((before.v, layer.v), 1)
            return attend(dataclasses.replace(layer, k=k, v=v, rotation=rotation), layer.window is not None)

        return self.emulator.logits(self.emulator.run(self.ids[-ROWS:], whole, self.length - ROWS, "highest"))

    def _store(self, layer: Layer) -> Tensor:
        kept = dataclasses.replace(layer, q=layer.q[:, :1], k=layer.k.clone(), v=layer.v.clone())
        self._prefix[layer.index] = kept
        return dense(layer)

    def _index(self, layer: Layer, index: Index) -> Stored:
        """The index of all pages: those of the prefill are built once."""
        index = dataclasses.replace(index, first=1.0)
        start = self.length - ROWS
        bias = self._constant(layer) if index.kind in _TURNED else None
        key = (index, layer.index)
        if key not in self._stored:
            self._stored[key] = build(index, layer.k[:, :start], _part(layer.rotation, slice(0, start)), bias)
        tail = build(index, layer.k[:, start:], _part(layer.rotation, slice(start, None)), bias)
        return {name: torch.cat((x, tail[name]), 1) for name, x in self._stored[key].items()}

    def _constant(self, layer: Layer) -> Tensor:
        """[Hk, D]: the mean key of each head before rotation, of the prefill."""
        if layer.index not in self._bias:
            if layer.rotation is None:
                raise ValueError("this kind of index needs a rotary embedding")
            self._bias[layer.index] = rotate(layer.k, layer.rotation, -1)[:, : self.length - ROWS].mean(1)
        return self._bias[layer.index]


def _part(rotation: Any, rows: slice) -> Any:
    return None if rotation is None else (rotation[0][rows], rotation[1][rows])


def _summary(seen: dict[int, Seen], layers: int) -> dict[str, float]:
    """Means over the sparse layers, the worst of them, and the share of the pages read, the other global `layers` counted."""
    row = {
        field: torch.stack([getattr(s, field) for s in seen.values()]).mean().item()
        for field in ("kept", "mass", "found", "error")
    }
    errors = torch.stack([s.error for s in seen.values()])
    row |= {"worst_head": errors.max().item(), "worst_layer": errors.mean(1).max().item()}
    return row | {"kept_with_dense": (row["kept"] * len(seen) + layers - len(seen)) / layers}
