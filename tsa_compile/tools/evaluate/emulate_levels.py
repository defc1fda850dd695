"""Levels of key blocks: estimates of their mass for a block of query rows, as `BlockRule` says."""

from __future__ import annotations

import dataclasses

import torch

from tsa_compile.tools.evaluate.emulate_attention import CHUNK, scores
from tsa_compile.tools.evaluate.emulate_blocks import BlockRule
from tsa_compile.tools.evaluate.emulate_model import Layer

Tensor = torch.Tensor
COARSE_SLACK = 8.0  # a coarse block passes at this part of the threshold


def levels(rule: BlockRule, layer: Layer) -> Tensor:
    """[H, row blocks, key blocks], float32; what is not wholly before the row block has no meaning there."""
    length = layer.k.shape[1]
    before, forced = rule.before(length, layer.k.device), rule.forced(length, layer.k.device)
    parts = []
    for group in range(layer.k.shape[0]):
        masses = _masses(rule, layer, group, before)
        if rule.share == "group":
            masses = masses.mean(0, keepdim=True).expand_as(masses)
        level = _level(rule.select, masses, before, forced)
        parts.append(level.amax(0, keepdim=True).expand_as(level) if rule.share == "union" else level)
    level = torch.cat(parts)
    if rule.coarse is not None:
        level = torch.minimum(level, COARSE_SLACK * _coarse(rule, rule.coarse, layer, level.shape[2]))
    return level


def _coarse(rule: BlockRule, size: int, layer: Layer, blocks: int) -> Tensor:
    """Levels of blocks of `size` keys, for each of their key blocks; infinite where the coarse block is not wholly before."""
    wide = dataclasses.replace(rule, keys=size, coarse=None, sub=None, completion=0)
    level = levels(wide, layer).masked_fill(~wide.before(layer.k.shape[1], layer.k.device), torch.inf)
    return level.repeat_interleave(size // rule.keys, 2)[:, :, :blocks]


def _level(select: str, masses: Tensor, before: Tensor, forced: Tensor) -> Tensor:
    free = (before & ~forced).expand_as(masses)
    chosen = masses.masked_fill(~free, 0.0)
    if select == "alpha":
        return masses / chosen.amax(-1, keepdim=True).clamp_min(1e-30)
    order = chosen.sort(-1, descending=True)
    if select == "top":
        place = torch.arange(masses.shape[-1], device=masses.device, dtype=torch.float32).expand_as(masses)
        return torch.empty_like(chosen).scatter_(-1, order.indices, -place)
    certain = masses.masked_fill(~before | free, 0.0).sum(-1, keepdim=True)
    heavier = certain + order.values.cumsum(-1) - order.values
    share = 1.0 - heavier / masses.masked_fill(~before, 0.0).sum(-1, keepdim=True).clamp_min(1e-30)
    return torch.empty_like(chosen).scatter_(-1, order.indices, share)


def _masses(rule: BlockRule, layer: Layer, group: int, before: Tensor) -> Tensor:
    """Masses [G, row blocks, key blocks] of the key blocks wholly before a row block, 0 elsewhere."""
    length = layer.k.shape[1]
    out = layer.q.new_zeros(layer.group, *before.shape, dtype=torch.float32)
    keys = _block_keys(rule, layer.k[group])
    for start in range(0, length, CHUNK):
        blocks = slice(start // rule.rows, -(-min(start + CHUNK, length) // rule.rows))
        q = _scoring_rows(rule, layer, group, blocks)  # [G, row blocks, m, D]
        count = min((blocks.stop * rule.rows) // rule.keys, length // rule.keys)
        logits = scores(q.flatten(1, 2), keys[: count * (keys.shape[0] // max(length // rule.keys, 1))], layer.scale)
        logits = logits.unflatten(2, (count, -1)).logsumexp(3) if count else logits
        logits = logits.unflatten(1, q.shape[1:3])
        logits = logits.masked_fill(~before[blocks, None, :count], -torch.inf)
        peak = logits.amax(-1, keepdim=True) if rule.normal == "row" else logits.amax((2, 3), keepdim=True)
        masses = torch.nan_to_num((logits - peak).exp())
        if rule.normal == "row":
            masses = torch.nan_to_num(masses / masses.sum(-1, keepdim=True))
        out[:, blocks, :count] = masses.mean(2) if rule.reduce == "mean" else masses.amax(2)
    return out


def _block_keys(rule: BlockRule, k: Tensor) -> Tensor:
    """The keys that score: all of the whole blocks' ("exact"), or means of `sub` of them."""
    k = k[: k.shape[0] // rule.keys * rule.keys]
    if rule.masses == "exact":
        return k
    means = k.float().unflatten(0, (-1, rule.sub or rule.keys)).mean(1)
    return means.bfloat16() if rule.rounded else means


def _scoring_rows(rule: BlockRule, layer: Layer, group: int, blocks: slice) -> Tensor:
    """Queries [G, row blocks, m, D] that stand for the row blocks; rows beyond the end repeat the last one."""
    of = slice(group * layer.group, (group + 1) * layer.group)
    rows = torch.arange(blocks.start * rule.rows, blocks.stop * rule.rows, device=layer.q.device)
    q = layer.q[of, rows.clamp(max=layer.q.shape[1] - 1)].unflatten(1, (-1, rule.rows))
    if rule.pool > 1:
        q = q.float().unflatten(2, (-1, rule.pool)).mean(3)
    return q[:, :, rule.stride - 1 :: rule.stride]
