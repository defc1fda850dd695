"""Which key blocks each block of query rows reads, in plain PyTorch. The contract is docs/operators.md, `select_key_blocks`.

A key block's mass for a row block is estimated by means: softmaxes over key blocks of the products of pooled queries with mean
keys, averaged. Kept is what reaches `alpha` times the heaviest block's mass, after FlashPrefill (arXiv 2603.06199, 2608.19758),
which sums per row and has no pooling.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from tsa_compile.kernels.common.row_blocks import KEYS, ROWS, WORD, own_keys, row_block_count, valid_keys, valid_range

Tensor = torch.Tensor


def select_key_blocks_reference(
    q: Tensor,
    means: Tensor,
    counts: Tensor,
    start: Tensor | None,
    lengths: Tensor | None,
    key_mask: Tensor | None,
    k_len: int,
    scale: float,
    alpha: Sequence[float],
    pool: int,
    window: int,
    sinks: int,
    last_dense: int,
    share: str = "head",
    lookahead: bool = True,
) -> Tensor:
    """`tsa::select_key_blocks`: int64 `[B, H or Hk, row blocks, words]`. Shapes and meaning: docs/operators.md."""
    heads, kv_heads = q.shape[1], means.shape[1]
    first, end = valid_range(q.shape[0], k_len, start, lengths, q.device)
    visible, forced = forced_blocks(q.shape[2], k_len, first, end, counts, window, sinks, last_dense)
    masses = block_masses(q, means, counts, first, end, key_mask, k_len, scale, pool, lookahead)
    if not lookahead:  # the first row block has no rows before it that could choose
        forced[:, :1] = True
    eligible = (visible & ~forced)[:, None]
    largest = torch.where(eligible, masses, 0).amax(-1, keepdim=True)
    alphas = torch.tensor(list(alpha), dtype=masses.dtype, device=q.device).view(1, -1, 1, 1)
    heavy = (masses >= alphas * largest) & ((masses > 0) | (alphas == 0))  # without a real row or a finite score: none
    kept = (forced & visible)[:, None] | (eligible & heavy)
    if share == "group":
        kept = kept.unflatten(1, (kv_heads, heads // kv_heads)).any(2)
    return pack_bits(kept)


def block_masses(
    q: Tensor,
    means: Tensor,
    counts: Tensor,
    first: Tensor,
    end: Tensor,
    key_mask: Tensor | None,
    k_len: int,
    scale: float,
    pool: int,
    lookahead: bool = True,
) -> Tensor:
    """Estimated mass of each key block for each row block, `[B, H, row blocks, key blocks]`.

    Each `pool` query rows give one score row, a softmax over the key blocks wholly before the row block; a row block's mass is
    the mean over its rows, or without `lookahead` over those of the row block before it. A score that is not finite counts as no
    mass.
    """
    mean_q, rows = pooled_queries(q.to(means.dtype), valid_keys(k_len, first, end, key_mask), pool)
    if not lookahead:
        mean_q, rows = F.pad(mean_q, (0, 0, 0, 0, 1, 0))[:, :, :-1], F.pad(rows, (0, 0, 1, 0))[:, :-1]
    keys = means.repeat_interleave(q.shape[1] // means.shape[1], 1)
    scores = scale * torch.einsum("bhrud,bhcd->bhruc", mean_q, keys)
    own = own_keys(q.shape[2], k_len, end)[1]
    before = (torch.arange(counts.shape[1], device=q.device) + 1) * KEYS <= own[..., None]
    scored = (before & (counts > 0)[:, None])[:, None, :, None] & scores.isfinite()
    share = torch.where(scored, scores, -torch.inf).softmax(-1).nan_to_num(0)
    weight = rows / rows.sum(-1, keepdim=True).clamp(min=1)
    return (share * weight[:, None, :, :, None]).sum(3)


def pooled_queries(q: Tensor, valid: Tensor, pool: int) -> tuple[Tensor, Tensor]:
    """Means of every `pool` rows `[B, H, R, ROWS / pool, D]` (R: row blocks), and how many rows each is of `[B, R, ROWS / pool]`.

    Rows at positions that are not `valid` `[B, Lk]` do not count.
    """
    q_len, k_len = q.shape[2], valid.shape[1]
    skipped, blocks = (k_len - q_len) % ROWS, row_block_count(q_len, k_len)
    behind = blocks * ROWS - skipped - q_len
    real = F.pad(valid[:, k_len - q_len :], (skipped, behind))
    padded = F.pad(q, (0, 0, skipped, behind))
    shape = (blocks, ROWS // pool, pool)
    total = torch.where(real[:, None, :, None], padded, 0).unflatten(2, shape).sum(4)
    rows = real.unflatten(1, shape).sum(3)
    return total / rows[:, None, :, :, None].clamp(min=1), rows


def forced_blocks(
    q_len: int, k_len: int, first: Tensor, end: Tensor, counts: Tensor, window: int, sinks: int, last_dense: int
) -> tuple[Tensor, Tensor]:
    """(key blocks that hold a key and do not lie behind the row block, those that the rule always keeps), `[B, R, C]` each."""
    begin, own = own_keys(q_len, k_len, end)
    at = torch.arange(counts.shape[1], device=end.device) * KEYS
    own = own[..., None]
    visible = (counts > 0)[:, None] & (at < own + ROWS)
    near = at + KEYS > own - window + 1
    sink = (at < first[:, None] + sinks)[:, None]
    dense = (begin < end[:, None]) & (begin + ROWS > end[:, None] - last_dense) if last_dense > 0 else begin < 0
    return visible, near | (at >= own) | sink | dense.expand(own.shape[:2])[..., None]


def pack_bits(kept: Tensor) -> Tensor:
    """bool `[..., C]` -> int64 `[..., ceil(C / 64)]`: bit `j % 64` of word `j // 64`."""
    padded = F.pad(kept, (0, -kept.shape[-1] % WORD)).unflatten(-1, (-1, WORD))
    return (padded.long() << torch.arange(WORD, device=kept.device)).sum(-1)


def unpack_bits(bits: Tensor, key_blocks: int) -> Tensor:
    """The inverse of `pack_bits`: bool `[..., key_blocks]`."""
    return (bits[..., None] >> torch.arange(WORD, device=bits.device) & 1).bool().flatten(-2)[..., :key_blocks]
