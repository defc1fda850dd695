"""Budgets of a decode rule by layer and head, or by mass, that read as many pages as equal ones do. Fitted on one text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from tsa_compile.tools.evaluate.emulate_decode import DecodeText
from tsa_compile.tools.evaluate.emulate_fit import by_error
from tsa_compile.tools.evaluate.emulate_model import Layer
from tsa_compile.tools.evaluate.emulate_outcome import exact_output, outcome
from tsa_compile.tools.evaluate.emulate_select import DecodeRule, Pages, mass_levels, shares

Tensor = torch.Tensor
GRID = (0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.35)


def by_head(
    text: DecodeText,
    rule: DecodeRule,
    keep: float,
    whole_layers: bool = False,
    layer_cost: dict[int, float] | None = None,
    grid: Sequence[float] = GRID,
) -> dict[int, Tensor]:
    """{layer: share of the pages [Hk]}, `keep` on average: the least summed error of the projected outputs.

    Args:
        whole_layers: one share for all heads of a layer.
        layer_cost: divergence when that layer alone is sparse at `keep`; errors are weighted so that they sum to it.
    """
    errors: list[dict[int, Tensor]] = [{} for _ in grid]
    kept: list[dict[int, Tensor]] = [{} for _ in grid]

    def attend(layer: Layer, local: bool) -> Tensor:
        exact = exact_output(layer)
        if not local and layer.index not in rule.dense_layers:
            for share, error, read in zip(grid, errors, kept, strict=True):
                out, seen = outcome(layer, text.choice(layer, rule, share))
                found = torch.stack((_projected_error(layer, out, exact), seen.kept))
                error[layer.index], read[layer.index] = found.sum(1, keepdim=True) if whole_layers else found
        return exact

    text.decode(attend)
    heads = {i: k.shape[0] for i, k in text.equal(keep).items() if i in errors[0]}
    dense = sum(text.equal(1.0)[i].shape[0] for i in rule.dense_layers)
    room = keep * (sum(heads.values()) + dense) - dense
    if layer_cost is not None:
        near = errors[min(range(len(grid)), key=lambda n: abs(grid[n] - keep))]
        scale = {i: max(c, 0.0) / float(near[i].sum().clamp_min(1e-12)) for i, c in layer_cost.items()}
        errors = [{i: e * scale[i] for i, e in table.items()} for table in errors]
    found = by_error(errors, kept, grid, room)
    return {i: shares.expand(heads[i]).contiguous() for i, shares in found.items()}


def by_mass(text: DecodeText, rule: DecodeRule, keep: float) -> float:
    """1 - p of the top-p rule that reads `keep` of the pages on average, dense layers counted, along an exact run."""
    levels, certain, total = [], 0.0, 0.0

    def attend(layer: Layer, local: bool) -> Tensor:
        nonlocal certain, total
        pages = Pages.of(rule, text.length, layer.q.shape[1], layer.k.device)
        for group in range(0 if local else layer.k.shape[0]):
            total += float(pages.count.sum())
            if layer.index in rule.dense_layers:
                certain += float(pages.count.sum())
                continue
            certain += float(pages.forced.sum())
            level = mass_levels(shares(text.masses(layer, rule.index, group, pages), pages), pages)
            levels.append(level[pages.whole & ~pages.forced])
        return exact_output(layer)

    text.decode(attend)
    ranked = torch.cat(levels).sort(descending=True).values
    return float(ranked[min(max(int(keep * total - certain), 1), ranked.shape[0]) - 1])


def _projected_error(layer: Layer, out: Tensor, exact: Tensor) -> Tensor:
    """[Hk]: squared norm of what each KV head's query heads change of the projected output, over the output's."""
    weight = layer.output.float().unflatten(1, (layer.k.shape[0], -1))  # [width, Hk, G * Dv]
    change, whole = (x.transpose(0, 1).unflatten(1, (layer.k.shape[0], -1)).flatten(2) for x in (out - exact, exact))
    norm = torch.einsum("ngc,wgc->nw", whole, weight).square().sum()
    return torch.stack([(change[:, g] @ weight[:, g].T).square().sum() / norm for g in range(weight.shape[1])])


def layer_costs(text: DecodeText, rule: DecodeRule, keep: float) -> dict[int, float]:
    """{layer: divergence in nats when it alone is sparse}."""
    layers = [i for i in text.layers() if i not in rule.dense_layers]
    others = {i: tuple(j for j in text.layers() if j != i) for i in layers}
    return {i: float(text.run(dataclasses.replace(rule, dense_layers=rest), keep)["kl"]) for i, rest in others.items()}
