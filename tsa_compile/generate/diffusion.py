"""Block diffusion: a sampling loop that knows its phases.

Block after block: all its tokens are [MASK], or the end of the prompt; the model sees the prefix and the whole block, and the
most confident predictions are put in their place, step by step; then the finished block joins the prefix by one more call, as
its keys and values change with its tokens. Block-trained models: SDAR (arXiv 2510.06303), BD3-LM (2503.09573); the confidence
threshold is Fast-dLLM's (2505.22618); parts and shifted predictions are Fast-dLLM v2's (2509.26328).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from tsa_compile.generate.block_cache import BlockCache, Watch
from tsa_compile.generate.diffused import Block, Diffused
from tsa_compile.generate.unmask import Sampling, possible, take
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
    part: int | None = None,
    shifted: bool = False,
    stop_id: int | None = None,
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
        steps: denoising steps of a block, which take as many tokens each; None: one token a step.
        threshold: each step also takes all predictions of at least this probability, so that it may need fewer steps.
        part: tokens of a block's parts, filled from left to right (sub-blocks, Fast-dLLM v2); None: the whole block at once.
        shifted: predictions are of the next token. A block's first one then comes from the call before it, as in Fast-dLLM v2.
        stop_id: no block begins once each row has this new token; what is behind it in its block stays.
        plan: policies of the phases "denoise_first" and "denoise", such as `Remembered("denoise_first")`; None: dense.
        temperature: of sampling, by torch's generator; 0: the likeliest token.
        watch: sees the lists that further steps read, see `BlockCache`.

    Raises:
        ValueError: an argument is outside its range, or a shifted model gets no prompt.
    """
    sampling = Sampling(mask_id, block, steps, threshold, part, shifted, stop_id, temperature)
    _check(ids, new_tokens, shifted)
    length = ids.shape[1]
    whole, end = length // block * block, -(-(length + new_tokens) // block) * block
    cache = BlockCache(Plan() if plan is None else as_plan(plan), block, end, watch)
    canvas = torch.cat([ids, ids.new_full((ids.shape[0], end - length), mask_id)], 1)
    loop = _Loop(model, canvas, cache, sampling)
    for start, rows in _parts(whole, block):
        loop.join("prefill", start, rows)
    blocks: list[Block] = []
    for start in range(whole, end, block):
        if blocks:
            loop.join("commit", start - block, block)
        blocks.append(loop.denoise(start, length))
        if loop.stopped(length, start + block):
            end = start + block
            break
    return Diffused(canvas[:, : min(length + new_tokens, end)], tuple(blocks), dict(loop.forwards))


@dataclasses.dataclass
class _Loop:
    """The tokens so far, `canvas` `[B, blocks * block]`, and what changes them."""

    model: BlockModel
    canvas: Tensor
    cache: BlockCache
    sampling: Sampling
    forwards: Counter[str] = dataclasses.field(default_factory=Counter)
    follows: Tensor | None = None  # of a shifted model: the token `[B]` behind the prefix

    def forward(self, phase: str, start: int, rows: int) -> Tensor:
        self.cache.begin(phase, rows)
        self.forwards[phase] += 1
        return self.model(self.canvas[:, start : start + rows], self.cache.positions(rows, self.canvas.device), self.cache)

    def join(self, phase: str, start: int, rows: int) -> None:
        """Finished tokens join the prefix."""
        logits = self.forward(phase, start, rows)
        if self.sampling.shifted:
            self.follows = possible(logits[:, -1], self.sampling.mask_id).argmax(-1)
        self.cache.commit(rows)

    def predict(self, phase: str, start: int) -> Tensor:
        """Logits `[B, block, vocabulary]` of the token at each position itself; a shifted model's first one, which is known, has
        none that mean anything."""
        logits = self.forward(phase, start, self.cache.block)
        return torch.cat([logits[:, :1], logits[:, :-1]], 1) if self.sampling.shifted else logits

    def denoise(self, start: int, length: int) -> Block:
        """Fill the block at `start`, of which the tokens before `length` are given."""
        block, width, given = self.cache.block, self.sampling.width, max(0, length - start)
        tokens = self.canvas[:, start : start + block]
        if self.follows is not None and given == 0:
            tokens[:, 0], given = self.follows, 1
        masked = (torch.arange(block, device=tokens.device) >= given).expand_as(tokens).clone()
        steps, done = torch.zeros_like(tokens), 0
        for at in range(given // width * width, block, width):
            own, step = slice(at, at + width), 0
            waiting = at + width - max(at, given)  # the same in all rows, unless a threshold decides
            while waiting > 0:
                logits = self.predict("denoise" if done else "denoise_first", start)
                count, done = self.sampling.count(step), done + 1
                steps[:, own] += done * take(tokens[:, own], masked[:, own], logits[:, own], self.sampling, count)
                waiting = waiting - count if self.sampling.threshold is None else int(masked[:, own].sum(1).max())
                step += 1
        return Block(start, done, self.cache.counts, steps)

    def stopped(self, length: int, end: int) -> bool:
        """Whether each row has the token that ends it among those from `length` to `end`."""
        stop = self.sampling.stop_id
        return stop is not None and bool((self.canvas[:, length:end] == stop).any(1).all())


def _parts(length: int, block: int) -> list[tuple[int, int]]:
    """(start, rows) of a prompt's parts, whole blocks each."""
    rows = max(1, PREFILL_ROWS // block) * block
    return [(start, min(rows, length - start)) for start in range(0, length, rows)]


def _check(ids: Tensor, new_tokens: int, shifted: bool) -> None:
    if ids.dim() != 2:
        raise ValueError(f"ids must be [batch, length], got {tuple(ids.shape)}")
    if new_tokens < 1:
        raise ValueError(f"new_tokens must be at least 1, got {new_tokens}")
    if shifted and ids.shape[1] == 0:
        raise ValueError("a shifted model predicts what follows a token: the prompt must have at least one")
