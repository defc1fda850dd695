"""What a decode rule costs on one text: the last positions, each by its own pages, after a dense prefill."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from tsa_compile.tools.evaluate.emulate_attention import scores
from tsa_compile.tools.evaluate.emulate_model import Emulator, Layer, dense
from tsa_compile.tools.evaluate.emulate_pages import PAGE, Index, Stored, build, rotate
from tsa_compile.tools.evaluate.emulate_prefill import divergence, relative_error
from tsa_compile.tools.evaluate.emulate_select import Budget, DecodeRule, Pages, choose, shares

Tensor = torch.Tensor
ROWS = 128
_TURNED = ("prerope", "unbiased", "unbiased_variance")


@dataclasses.dataclass
class Seen:
    """What one layer of one run showed, over rows and heads: [Hk] or [H] tensors on the device."""

    kept: Tensor  # share of the visible pages [Hk]
    mass: Tensor  # true mass of the kept pages [Hk]
    found: Tensor  # share of the true best pages, the forced ones aside [Hk]
    error: Tensor  # of the output [H]


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
        self.exact = self.decode(lambda layer, local: self.exact_output(layer))

    def run(self, rule: DecodeRule, budget: Budget) -> dict[str, Any]:
        """Decode under the rule; divergence in nats by position, and what the layers showed."""
        seen: dict[int, Seen] = {}

        def attend(layer: Layer, local: bool) -> Tensor:
            if local or layer.index in rule.dense_layers:
                return self.exact_output(layer)
            out, seen[layer.index] = self.outcome(layer, rule, budget)
            return out

        logits = self.decode(attend)
        kl, same = divergence(self.exact, logits)
        row: dict[str, Any] = {"kl": kl.mean().item(), "worst": kl.max().item(), "top1": same.float().mean().item()}
        for field in ("kept", "mass", "found", "error"):
            row[field] = torch.stack([getattr(s, field) for s in seen.values()]).mean().item()
        errors = torch.stack([s.error for s in seen.values()])
        dim = next(iter(self._prefix.values())).q.shape[-1]
        row |= {"worst_head": errors.max().item(), "worst_layer": errors.mean(1).max().item()}
        total = sum(layer.window is None for layer in self._prefix.values())
        row["kept_with_dense"] = (row["kept"] * len(seen) + total - len(seen)) / total
        return row | {"bytes_per_key": rule.index.bytes_per_key(dim), "kl_by_position": [round(x, 5) for x in kl.tolist()]}

    def outcome(self, layer: Layer, rule: DecodeRule, budget: Budget) -> tuple[Tensor, Seen]:
        """(output [H, n, Dv], what was seen) of one layer with all its keys."""
        of_head = (
            budget[layer.index] if isinstance(budget, dict) else torch.full((layer.k.shape[0],), budget, device=layer.k.device)
        )
        pages = Pages.of(rule, self.length, layer.q.shape[1], layer.k.device)
        masks = [choose(rule, self.share(layer, rule.index, g, pages), pages, of_head[g]) for g in range(layer.k.shape[0])]
        return _outcome(layer, torch.stack(masks), pages, rule.completion)

    def share(self, layer: Layer, index: Index, group: int, pages: Pages) -> Tensor:
        """Estimated mass shares [n, P] of one KV head's pages."""
        stored = self._index(layer, index)
        means = self._index(layer, Index("mean")) if index.first < 1.0 else None
        q = layer.q[group * layer.group : (group + 1) * layer.group]
        one = {name: x[group] for name, x in stored.items()}
        return shares(index, one, means and {n: x[group] for n, x in means.items()}, q, layer.scale, pages)

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

    def exact_output(self, layer: Layer) -> Tensor:
        """Every visible key: [H, n, Dv]."""
        return _outcome(layer, None)[0]

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


def _outcome(layer: Layer, chosen: Any, pages: Pages | None = None, completion: bool = False) -> tuple[Tensor, Any]:
    """(output [H, n, Dv], Seen) of the last n rows; chosen [Hk, n, P]: pages read; None: everything, with the layer's window."""
    rows, length = layer.q.shape[1], layer.k.shape[1]
    outs, seen = [], []
    for g in range(layer.k.shape[0]):
        q, v = layer.q[g * layer.group : (g + 1) * layer.group], layer.v[g].float()
        logits = scores(q, layer.k[g], layer.scale).masked_fill_(~_sees(layer, rows, length), -torch.inf)
        exact = logits.softmax(-1)
        if pages is None:
            outs.append(exact @ v)
            continue
        keep = chosen[g]
        sparse = logits.masked_fill(~keep.repeat_interleave(PAGE, 1), -torch.inf)
        if completion:
            kbar, vbar = (x.float().unflatten(0, (-1, PAGE)).mean(1) for x in (layer.k[g], layer.v[g]))
            rest = (scores(q, kbar, layer.scale) + math.log(PAGE)).masked_fill_(keep | ~pages.whole, -torch.inf)
            out = torch.cat((sparse, rest), -1).softmax(-1) @ torch.cat((v, vbar))
        else:
            out = sparse.softmax(-1) @ v
        outs.append(out)
        seen.append(_see(exact, keep, pages) | {"error": relative_error(out, exact @ v)})
    merged = None
    if seen:
        kept, mass, found = (torch.stack([s[f] for s in seen]) for f in ("kept", "mass", "found"))
        merged = Seen(kept, mass, found, torch.cat([s["error"] for s in seen]))
    return torch.cat(outs), merged


def _sees(layer: Layer, rows: int, length: int) -> Tensor:
    row = torch.arange(length - rows, length, device=layer.k.device)[:, None]
    key = torch.arange(length, device=layer.k.device)[None]
    sees = key <= row
    return sees if layer.window is None else sees & (key > row - layer.window)


def _see(exact: Tensor, keep: Tensor, pages: Pages) -> dict[str, Tensor]:
    """Means over rows, from the true probabilities [G, n, L]."""
    mass = exact.unflatten(-1, (-1, PAGE)).sum(-1).mean(0)
    free, count = keep & ~pages.forced, keep.sum(-1)
    ranked = mass.masked_fill(pages.forced, math.inf).masked_fill(~pages.visible, -math.inf)
    best = (ranked.argsort(-1, descending=True).argsort(-1) < count[:, None]) & ~pages.forced & pages.visible
    found = (best & free).sum(-1) / best.sum(-1).clamp_min(1)
    return {"kept": (count / pages.count).mean(), "mass": (mass * keep).sum(-1).mean(), "found": found.mean()}
