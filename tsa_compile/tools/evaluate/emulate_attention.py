"""Prefill attention under any mask, by blocks of rows: exact in float32, at any length that the GPU's memory has room for."""

from __future__ import annotations

from typing import Protocol

import torch

from tsa_compile.tools.evaluate.emulate_model import Layer

Tensor = torch.Tensor
CHUNK = 1024  # rows whose scores exist at a time


class Mask(Protocol):
    """What the rows of one layer read."""

    def hidden(self, group: int, start: int, end: int) -> Tensor:
        """bool [G, end - start, end], a tensor of its own: keys that these rows of the group's heads leave out. Causality is
        not its matter."""

    def summaries(self, group: int, start: int, end: int) -> Summaries | None:
        """What stands for left-out keys, or None."""


Summaries = tuple[Tensor, Tensor, Tensor]  # keys [N, D], values [N, Dv], logit to add [G, rows, N] (-inf: not read)


def scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale * q k' of q [G, n, D] and k [N, D] or [G, N, D]: [G, n, N], float32."""
    k = k.float().expand(q.shape[0], *k.shape[-2:])
    return torch.baddbmm(q.new_empty(1, 1, 1, dtype=torch.float32), q.float(), k.mT, beta=0, alpha=scale)


def masked_attention(layer: Layer, mask: Mask, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """Causal attention that reads what `mask` leaves.

    Args:
        layer: a prefill: n = L.
        chunk: rows at a time, a multiple of the mask's row block.

    Returns:
        out [H, L, Dv], float32, zero where a row reads nothing; pairs read by each head [H], int64.
    """
    heads, length, _ = layer.q.shape
    out = layer.v.new_empty(heads, length, layer.v.shape[2], dtype=torch.float32)
    pairs = torch.zeros(heads, dtype=torch.int64, device=out.device)
    for group in range(layer.k.shape[0]):
        of = slice(group * layer.group, (group + 1) * layer.group)
        v = layer.v[group].float()
        for start in range(0, length, chunk):
            end = min(start + chunk, length)
            q = layer.q[of, start:end]
            logits = scores(q, layer.k[group, :end], layer.scale)
            hidden = mask.hidden(group, start, end)
            hidden[..., start:] |= torch.ones(end - start, end - start, dtype=torch.bool, device=out.device).triu(1)
            pairs[of] += (end - start) * end - hidden.sum((1, 2))
            logits.masked_fill_(hidden, -torch.inf)
            out[of, start:end] = _attend(logits, v[:end], q, mask.summaries(group, start, end), layer.scale)
    return out, pairs


def _attend(logits: Tensor, v: Tensor, q: Tensor, summaries: Summaries | None, scale: float) -> Tensor:
    if summaries is not None:
        keys, values, added = summaries
        logits = torch.cat((logits, scores(q, keys, scale) + added), -1)
        v = torch.cat((v, values))
    return torch.nan_to_num(logits.softmax(-1)) @ v


def causal_pairs(length: int) -> int:
    """Query-key pairs of one head under a causal mask."""
    return length * (length + 1) // 2
