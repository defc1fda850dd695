"""`tsa::padding_range`, `key_block_means` and `select_key_blocks` in core operators (docs/operators.md).

What they hand each other is not what the operators do: there is one block of each kind more (`blocks.py`), and the bitmap is not
packed, as TensorRT has no shifts. It is bool `[B, H or Hk, R + 1, C + 1]`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tsa_compile.export.torch_tensorrt_lowering.blocks import Keys, RowBlocks, refuse_pool
from tsa_compile.export.torch_tensorrt_lowering.rank import constants
from tsa_compile.export.torch_tensorrt_lowering.rows import HIDDEN, number, take
from tsa_compile.kernels.common.row_blocks import KEYS, ROWS

Tensor = torch.Tensor
_LARGEST = torch.finfo(torch.float32).max


def padding_range(key_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(first key of each row, positions from there to its last), int32 `[B]` each, of a bool key mask `[B, Lk]`."""
    position = torch.arange(key_mask.shape[1], device=key_mask.device)
    last = torch.where(key_mask, position, -1).amax(1, keepdim=True)
    first = torch.where(key_mask, position, last + 1).amin(1, keepdim=True)
    return first[:, 0].int(), (last + 1 - first)[:, 0].int()


def key_block_means(
    k: Tensor, start: Tensor | None, lengths: Tensor | None, key_mask: Tensor | None, blocks: Tensor | None = None,
    block: int = 1, k_len: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(means of every 64 keys, float32 `[B, Hk, C + 1, D]`; how many keys each is of, int64 `[b, C + 1]`).

    Raises:
        ExportError: keys lie in a pool.
    """
    refuse_pool("key_block_means", blocks, k_len)
    keys = Keys(k, start, lengths, key_mask)
    position = torch.arange(keys.blocks, device=k.device)[:, None] * KEYS + torch.arange(KEYS, device=k.device)
    held = keys.hold(position)
    counts = held.long().sum(2)
    rows = take(k, keys.clip(position)[None, None], keys.kv_heads).float()
    total = torch.where(held[:, None, :, :, None], rows, 0.0).sum(3)
    return total / counts.clamp(min=1)[:, None, :, None].float(), counts


def select_key_blocks(
    q: Tensor, k: Tensor, means: Tensor, counts: Tensor, start: Tensor | None, lengths: Tensor | None, key_mask: Tensor | None,
    scale: float, alpha: Sequence[float], pool: int, window: int, sinks: int, last_dense: int, *, share: str = "head",
    lookahead: bool = True, k_len: int | None = None, min_queries: int = 0, dense_below: int = 0,
) -> Tensor:  # fmt: skip
    """Which key blocks each row block reads: bool `[B, H or Hk, R + 1, C + 1]`. means, counts: of the lowered `key_block_means`.

    Fewer than `dense_below` keys are all read.

    Raises:
        ExportError: keys lie in a pool.
    """
    refuse_pool("select_key_blocks", None, k_len)
    keys = Keys(k, start, lengths, key_mask)
    cut = RowBlocks(q.shape[2], keys)
    held = counts > 0
    at = torch.arange(keys.blocks, device=q.device) * KEYS
    own = cut.own[..., None]
    visible = held[:, None] & (at < own + ROWS)
    forced = _forced(keys, cut, at, window, sinks, last_dense, lookahead)
    masses = _masses(q, means, held, keys, cut, at, scale, pool, lookahead)
    eligible = (visible & ~forced)[:, None]
    alphas = constants(list(alpha), q.device)[None, :, None, None]
    least = torch.where(eligible, masses, 0.0).amax(3, keepdim=True) * alphas
    heavy = (masses >= least) & ((masses > 0) | (alphas == 0))
    queries, positions = number(q.shape[2], q.device)[..., None, None], number(keys.length, q.device)[..., None, None]
    if min_queries and not (isinstance(cut.offset, int) and cut.offset == 0):
        heavy = heavy | ((queries <= min_queries) & (queries < positions))
    if dense_below:
        heavy = heavy | (positions < dense_below)
    kept = (forced & visible)[:, None] | (eligible & heavy)
    return kept if share == "head" else kept.unflatten(1, (keys.kv_heads, -1)).long().sum(2) > 0


def _forced(keys: Keys, cut: RowBlocks, at: Tensor, window: int, sinks: int, last_dense: int, lookahead: bool) -> Tensor:
    """Key blocks that the rule always keeps, if they hold keys and do not lie behind: bool `[b, R + 1, C + 1]`. at: `[C + 1]`."""
    own, begin = cut.own[..., None], cut.begin[:, None]
    forced = (at + KEYS > own - window + 1) | (at < keys.first[..., None] + sinks)
    if last_dense > 0:
        end = keys.end[..., None]
        forced = forced | ((begin < end) & (begin + ROWS > end - last_dense))
    return forced if lookahead else forced | (begin == cut.before * ROWS)


def _masses(
    q: Tensor, means: Tensor, held: Tensor, keys: Keys, cut: RowBlocks, at: Tensor, scale: float, pool: int, lookahead: bool
) -> Tensor:
    """Estimated mass of each key block for each row block, float32 `[B, H, R + 1, C + 1]`."""
    mean_q, rows = _pooled_queries(q, keys, cut, pool, 0 if lookahead else -ROWS)
    grouped = mean_q.unflatten(1, (keys.kv_heads, -1))
    scores = (grouped @ means[:, :, None, None].transpose(4, 5) * scale).flatten(1, 2)
    before = (at + KEYS <= cut.own[..., None]) & held[:, None]
    scored = before[:, None, :, None] & (scores.abs() <= _LARGEST)
    share = torch.where(scored, torch.where(scored, scores, HIDDEN).softmax(-1), 0.0)
    weight = rows.float() / rows.sum(2, keepdim=True).clamp(min=1).float()
    return (share * weight[:, None, ..., None]).sum(3)


def _pooled_queries(q: Tensor, keys: Keys, cut: RowBlocks, pool: int, shift: int) -> tuple[Tensor, Tensor]:
    """(means of every `pool` rows, float32 `[B, H, R + 1, n, D]`; how many rows each is of, int64 `[b, R + 1, n]`).

    The rows are those of the row blocks, or those that lie `shift` after them.
    """
    step = torch.arange(ROWS // pool, device=q.device)[:, None] * pool + torch.arange(pool, device=q.device)
    position = cut.begin[:, None, None] + step + shift
    real = keys.hold(position) & (position >= cut.offset)
    taken = take(q, (keys.clip(position) - cut.offset).clamp(min=0)[None, None], q.shape[1]).float()
    rows = real.long().sum(3)
    total = torch.where(real[:, None, ..., None], taken, 0.0).sum(4)
    return total / rows.clamp(min=1)[:, None, ..., None].float(), rows
