"""The attention of a text's last rows by chosen pages, and what that shows of the choice."""

from __future__ import annotations

import dataclasses
import math

import torch

from tsa_compile.tools.evaluate.emulate_attention import scores
from tsa_compile.tools.evaluate.emulate_model import Layer
from tsa_compile.tools.evaluate.emulate_pages import PAGE
from tsa_compile.tools.evaluate.emulate_prefill import relative_error
from tsa_compile.tools.evaluate.emulate_select import Pages

Tensor = torch.Tensor


@dataclasses.dataclass
class Seen:
    """What one layer of one run showed, over rows and heads: [Hk] or [H] tensors on the device."""

    kept: Tensor  # share of the visible pages [Hk]
    mass: Tensor  # true mass of the kept pages [Hk]
    found: Tensor  # share of the true best pages, the forced ones aside [Hk]
    error: Tensor  # of the output [H]


@dataclasses.dataclass(frozen=True)
class Choice:
    """The pages that the rows of one layer read.

    Args:
        chosen: bool [Hk, n, P].
        pages: of these rows.
        rest: log mass [Hk, G, n, P] with which pages that are not read enter the softmax, by their mean value; None: they do not.
    """

    chosen: Tensor
    pages: Pages
    rest: Tensor | None = None


def exact_output(layer: Layer) -> Tensor:
    """Every visible key, within the layer's window: [H, n, Dv]."""
    groups = range(layer.k.shape[0])
    return torch.cat([_logits(layer, g).softmax(-1) @ layer.v[g].float() for g in groups])


def outcome(layer: Layer, choice: Choice) -> tuple[Tensor, Seen]:
    """(output [H, n, Dv], Seen) of the last n rows."""
    outs, seen = [], []
    for g in range(layer.k.shape[0]):
        logits, v, keep = _logits(layer, g), layer.v[g].float(), choice.chosen[g]
        exact = logits.softmax(-1)
        sparse = logits.masked_fill_(~keep.repeat_interleave(PAGE, 1), -torch.inf)
        if choice.rest is None:
            out = sparse.softmax(-1) @ v
        else:
            rest = choice.rest[g].masked_fill(keep | ~choice.pages.whole, -torch.inf)
            means = v.unflatten(0, (-1, PAGE)).mean(1)
            out = torch.cat((sparse, rest), -1).softmax(-1) @ torch.cat((v, means))
        outs.append(out)
        seen.append(_see(exact, keep, choice.pages) | {"error": relative_error(out, exact @ v)})
    kept, mass, found = (torch.stack([s[f] for s in seen]) for f in ("kept", "mass", "found"))
    return torch.cat(outs), Seen(kept, mass, found, torch.cat([s["error"] for s in seen]))


def mean_masses(layer: Layer, group: int) -> Tensor:
    """Log masses [G, n, P] of one KV head's pages, by their mean keys."""
    q = layer.q[group * layer.group : (group + 1) * layer.group]
    return scores(q, layer.k[group].float().unflatten(0, (-1, PAGE)).mean(1), layer.scale) + math.log(PAGE)


def page_masses(layer: Layer, group: int) -> Tensor:
    """True shares of the softmax [n, P] of one KV head's pages, mean over its query heads."""
    return _logits(layer, group).softmax(-1).unflatten(-1, (-1, PAGE)).sum(-1).mean(0)


def best_pages(mass: Tensor, pages: Pages, count: Tensor) -> Tensor:
    """bool [n, P]: the heaviest pages of mass [n, P] that are not always read, `count` [n] of them with those that are."""
    ranked = mass.masked_fill(pages.forced, math.inf).masked_fill(~pages.visible, -math.inf)
    return (ranked.argsort(-1, descending=True).argsort(-1) < count[:, None]) & ~pages.forced & pages.visible


def _logits(layer: Layer, group: int) -> Tensor:
    """[G, n, L] of one KV head, a tensor of its own; hidden keys are -inf."""
    rows, length = layer.q.shape[1], layer.k.shape[1]
    row = torch.arange(length - rows, length, device=layer.k.device)[:, None]
    key = torch.arange(length, device=layer.k.device)[None]
    sees = key <= row
    if layer.window is not None:
        sees = sees & (key > row - layer.window)
    q = layer.q[group * layer.group : (group + 1) * layer.group]
    return scores(q, layer.k[group], layer.scale).masked_fill_(~sees, -torch.inf)


def _see(exact: Tensor, keep: Tensor, pages: Pages) -> dict[str, Tensor]:
    """Means over rows, from the true probabilities [G, n, L]."""
    mass, count = exact.unflatten(-1, (-1, PAGE)).sum(-1).mean(0), keep.sum(-1)
    best = best_pages(mass, pages, count)
    found = (best & keep).sum(-1) / best.sum(-1).clamp_min(1)
    return {"kept": (count / pages.count).mean(), "mass": (mass * keep).sum(-1).mean(), "found": found.mean()}
