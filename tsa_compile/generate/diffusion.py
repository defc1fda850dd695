"""Block diffusion: a sampling loop that knows its phases.

Block after block: all its tokens are [MASK], or the end of the prompt; the model sees the prefix and the whole block, and the
most confident predictions are put in their place, step by step; then the finished block joins the prefix by one more call, as
its keys and values change with its tokens. Block-trained models: SDAR (arXiv 2510.06303), BD3-LM (2503.09573); the confidence
threshold is Fast-dLLM's (2505.22618).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from tsa_compile.generate.block_cache import BlockCache, Watch
from tsa_compile.generate.diffused import Block, Diffused
from tsa_compile.plan import Plan, as_plan
from tsa_compile.policies.base import Policy

Tensor = torch.Tensor
PREFILL_ROWS = 1024  # tokens of the prompt that are read at a time


class BlockModel(Protocol):
    """What the loop drives: any callable, which calls `attend(layer, q, k, v)`, q and k after RoPE, in place of an attention."""

    def __call__(self, ids: Tensor, positions: Tensor, attend: BlockCache) -> Tensor:
        """Token ids `[B, n]` at `positions` `[n]` -> logits `[B, n, vocabulary]`, of the token at each position itself."""


@torch.no_grad()
def diffuse(
    model: BlockModel,
    ids: Tensor,
    new_tokens: int,
    *,
    mask_id: int,
    block: int = 32,
    steps: int | None = None,
    threshold: float | None = None,
    plan: Policy | Plan | Mapping[str, Any] | None = None,
    temperature: float = 0.0,
    watch: Watch | None = None,
) -> Diffused:
    """Generate `new_tokens` after a prompt, block by block.

    Args:
        model: see `BlockModel`; a checkpoint comes by `generate.checkpoints`.
        ids: prompts of one length, `[B, L]`; a rest that fills no block begins the first one.
        new_tokens: how many.
        mask_id: the [MASK] token, which is never predicted.
        block: tokens of a block, as the model was trained.
        steps: denoising steps of a block, at each of which as many tokens are taken; None: one token a step.
        threshold: in place of `steps`: at each step all predictions of at least this probability are taken, and the best one.
        plan: policies of the phases "denoise_first" and "denoise", such as `Remembered("denoise_first")`; None: dense.
        temperature: of sampling, by torch's generator; 0: the likeliest token.
        watch: sees the lists that further steps read, see `BlockCache`.

    Raises:
        ValueError: an argument is outside its range, or both of `steps` and `threshold` are given.
    """
    _check(ids, new_tokens, block, steps, threshold, temperature)
    length = ids.shape[1]
    whole, end = length // block * block, -(-(length + new_tokens) // block) * block
    cache = BlockCache(Plan() if plan is None else as_plan(plan), block, end, watch)
    canvas = torch.cat([ids, ids.new_full((ids.shape[0], end - length), mask_id)], 1)
    loop = _Loop(model, canvas, cache, mask_id, steps or block, threshold, temperature)
    for start, rows in _parts(whole, block):
        loop.join("prefill", start, rows)
    blocks = []
    for start in range(whole, end, block):
        blocks.append(loop.denoise(start, length))
        if start + block < end:
            loop.join("commit", start, block)
    return Diffused(canvas[:, : length + new_tokens], tuple(blocks), dict(loop.forwards))


@dataclasses.dataclass
class _Loop:
    """The tokens so far, `canvas` `[B, blocks * block]`, and what changes them."""

    model: BlockModel
    canvas: Tensor
    cache: BlockCache
    mask_id: int
    steps: int
    threshold: float | None
    temperature: float
    forwards: Counter[str] = dataclasses.field(default_factory=Counter)

    def forward(self, phase: str, start: int, rows: int) -> Tensor:
        self.cache.begin(phase, rows)
        self.forwards[phase] += 1
        return self.model(self.canvas[:, start : start + rows], self.cache.positions(rows, self.canvas.device), self.cache)

    def join(self, phase: str, start: int, rows: int) -> None:
        """Finished tokens join the prefix."""
        self.forward(phase, start, rows)
        self.cache.commit(rows)

    def denoise(self, start: int, length: int) -> Block:
        """Fill the block at `start`, of which the tokens before `length` are given."""
        block = self.cache.block
        part = self.canvas[:, start : start + block]
        masked = (torch.arange(start, start + block, device=part.device) >= length).expand_as(part).clone()
        steps = torch.zeros_like(part)
        done, waiting = 0, min(block, start + block - length)  # the same in all rows, unless a threshold decides
        while waiting > 0:
            logits = self.forward("denoise" if done else "denoise_first", start, block)
            count = None if self.threshold is not None else -(-waiting // (self.steps - done))
            done += 1
            steps += done * take(part, masked, logits, self.mask_id, count, self.threshold, self.temperature)
            waiting = int(masked.sum(1).max()) if count is None else waiting - count
        return Block(start, done, self.cache.counts, steps)


def take(
    part: Tensor, masked: Tensor, logits: Tensor, mask_id: int, count: int | None, threshold: float | None, temperature: float
) -> Tensor:
    """Put the most confident predictions into `part` `[B, n]` where it is `masked`, both in place.

    Args:
        logits: `[B, n, vocabulary]`.
        count: how many a row; None: those of at least `threshold`, and the best.

    Returns:
        bool `[B, n]`: which were put in place.
    """
    logits = logits.float().index_fill(-1, torch.tensor([mask_id], device=logits.device), -torch.inf)
    if temperature > 0:
        chances = (logits / temperature).softmax(-1)
        tokens = torch.multinomial(chances.flatten(0, 1), 1).view_as(part)
    else:
        chances = logits.softmax(-1)
        tokens = logits.argmax(-1)
    confidence = chances.gather(-1, tokens[..., None])[..., 0].masked_fill(~masked, -1.0)
    if threshold is not None:
        taken = (confidence >= threshold).scatter(1, confidence.argmax(1, keepdim=True), True) & masked
    else:
        assert count is not None
        taken = torch.zeros_like(masked).scatter(1, confidence.topk(count, 1).indices, True)
    part.copy_(torch.where(taken, tokens, part))
    masked &= ~taken
    return taken


def _parts(length: int, block: int) -> list[tuple[int, int]]:
    """(start, rows) of a prompt's parts, whole blocks each."""
    rows = max(1, PREFILL_ROWS // block) * block
    return [(start, min(rows, length - start)) for start in range(0, length, rows)]


def _check(ids: Tensor, new_tokens: int, block: int, steps: int | None, threshold: float | None, temperature: float) -> None:
    if ids.dim() != 2:
        raise ValueError(f"ids must be [batch, length], got {tuple(ids.shape)}")
    if new_tokens < 1 or block < 1:
        raise ValueError(f"new_tokens and block must be at least 1, got {new_tokens} and {block}")
    if steps is not None and threshold is not None:
        raise ValueError(f"either steps or threshold says how many tokens a step takes, got {steps} and {threshold}")
    if steps is not None and not 1 <= steps <= block:
        raise ValueError(f"steps must be from 1 to the {block} tokens of a block, got {steps}")
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(f"threshold must be in (0, 1], got {threshold}")
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
