"""Checks of the operators of block-sparse prefill. They read shapes and dtypes only, never data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tsa_compile.kernels.checks import MAX_HEAD_DIM, SHARES, check_attention, check_engine, check_operands, check_tokens
from tsa_compile.kernels.common.row_blocks import ROWS, key_block_count, row_block_count, word_count
from tsa_compile.kernels.decode_checks import check_view
from tsa_compile.kernels.types import KeyBlockRule, KvView, Operands, Strip, Tokens

Tensor = torch.Tensor
Optional = Tensor | None
MAX_SOURCES = 1 << 30  # tokens before a block: positions are int32


def padding_range(key_mask: Tensor) -> None:
    if key_mask.dtype != torch.bool or key_mask.dim() != 2 or key_mask.shape[1] == 0:
        raise ValueError(
            f"tsa::padding_range: key_mask must be bool [B, Lk], Lk > 0, got {key_mask.dtype} {tuple(key_mask.shape)}"
        )


def key_block_means(
    k: Tensor, start: Optional, lengths: Optional, key_mask: Optional, blocks: Optional = None, block: int = 1,
    k_len: int | None = None,
) -> None:  # fmt: skip
    name = "tsa::key_block_means"
    check_attention(name, k, k, None, None)
    rows = k if blocks is None else k[:1].expand(blocks.shape[0], -1, -1, -1)  # k is a pool of blocks
    k_len = _check_length(name, rows, k, KvView(blocks, block, None, None), k_len, 0)
    _check_padding(name, rows, k_len, start, lengths, key_mask)


def select_key_blocks(
    q: Tensor, means: Tensor, counts: Tensor, start: Optional, lengths: Optional, key_mask: Optional, k_len: int, scale: float,
    alpha: Sequence[float], pool: int, window: int, sinks: int, last_dense: int, share: str = "head", lookahead: bool = True,
) -> None:  # fmt: skip
    name = "tsa::select_key_blocks"
    if means.dim() != 4 or not 1 <= means.shape[1] <= q.shape[1]:
        raise ValueError(f"{name}: means must be [B, Hk, key blocks, D], got {tuple(means.shape)}")
    check_attention(name, q, q, None, None)
    if q.shape[1] % means.shape[1]:
        raise ValueError(f"{name}: {q.shape[1]} query heads are no multiple of {means.shape[1]} KV heads")
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    blocks = (q.shape[0], key_block_count(k_len))
    if means.dtype != exact or (means.shape[0], *means.shape[2:]) != (*blocks, q.shape[3]) or means.device != q.device:
        raise ValueError(f"{name}: means {means.dtype} {tuple(means.shape)} do not fit q {tuple(q.shape)} and k_len {k_len}")
    if counts.dtype != torch.int32 or tuple(counts.shape) != blocks or counts.device != q.device:
        raise ValueError(f"{name}: counts must be int32 {blocks} on {q.device}, got {counts.dtype} {tuple(counts.shape)}")
    if not (means.is_contiguous() and counts.is_contiguous()):
        raise ValueError(f"{name}: means and counts must be contiguous, got strides {means.stride()} and {counts.stride()}")
    if q.shape[2] > k_len:
        raise ValueError(f"{name}: {q.shape[2]} queries for {k_len} keys; queries are the last positions")
    _check_padding(name, q, k_len, start, lengths, key_mask)
    check_rule(name, q.shape[1], alpha, pool, window, sinks, last_dense, share, lookahead)


def role_key_blocks(
    q: Tensor, k: Tensor, start: Optional, lengths: Optional, local: Sequence[bool], window: int, first_keys: int, k_len: int
) -> None:
    name = "tsa::role_key_blocks"
    check_attention(name, q, q, None, None)
    if q.shape[2] > k_len:
        raise ValueError(f"{name}: {q.shape[2]} queries for {k_len} keys; queries are the last positions")
    _check_padding(name, q, k_len, start, lengths, None)
    if len(local) != q.shape[1] or window < 1 or first_keys < 0:
        got = f"{list(local)}, {window} and {first_keys}"
        raise ValueError(f"{name}: local must be {q.shape[1]} bools, window at least 1 and first_keys 0, got {got}")


def check_rule(
    name: str, heads: int, alpha: Sequence[float], pool: int, window: int, sinks: int, last_dense: int, share: str,
    lookahead: bool = True,
) -> None:  # fmt: skip
    """Raise a ValueError naming operator `name` and the number that is outside its range."""
    if not lookahead and last_dense:
        raise ValueError(f"{name}: without lookahead last_dense must be 0, as it follows the end of the keys, got {last_dense}")
    if len(alpha) not in (1, heads) or not all(0 <= a < 1 for a in alpha):
        raise ValueError(f"{name}: alpha must be one number in [0, 1), or one for each of {heads} heads, got {list(alpha)}")
    if pool < 1 or ROWS % pool:
        raise ValueError(f"{name}: pool must divide {ROWS}, got {pool}")
    if window < 1 or sinks < 0 or last_dense < 0:
        raise ValueError(f"{name}: window must be >= 1, sinks and last_dense >= 0, got {window}, {sinks} and {last_dense}")
    if share not in SHARES:
        raise ValueError(f"{name}: share must be one of {SHARES}, got {share!r}")


def key_block_attention(
    q: Tensor, k: Tensor, v: Tensor, bits: Tensor, blocks: Optional, block: int, start: Optional, lengths: Optional,
    key_mask: Optional, scale: float, need_lse: bool, *, k_len: int | None = None,
) -> None:  # fmt: skip
    name = "tsa::key_block_attention"
    _check_attended(name, q, k, v, blocks)
    q_len = q.shape[2]
    k_len = _check_length(name, q, k, KvView(blocks, block, None, None), k_len, q_len)
    _check_padding(name, q, k_len, start, lengths, key_mask)
    shape = (row_block_count(q_len, k_len), word_count(k_len))
    if bits.dtype != torch.int64 or bits.dim() != 4 or bits.device != q.device or not bits.is_contiguous():
        raise ValueError(f"{name}: bits must be contiguous 4-d int64 on {q.device}, got {bits.dtype} {tuple(bits.shape)}")
    if bits.shape[0] != q.shape[0] or bits.shape[1] not in (q.shape[1], k.shape[1]) or tuple(bits.shape[2:]) != shape:
        raise ValueError(f"{name}: bits must be [B, H or Hk, {shape[0]}, {shape[1]}], got {tuple(bits.shape)}")


def block_sparse_attention(
    x: Operands, k_len: int | None, scale: float, alpha: Sequence[float], pool: int, window: int, sinks: int, last_dense: int,
    share: str, lookahead: bool,
) -> None:  # fmt: skip
    name = "tsa::block_sparse_attention"
    _check_attended(name, x.q, x.k, x.v, x.view.blocks)
    k_len = _check_length(name, x.q, x.k, KvView(x.view.blocks, x.view.block, None, None), k_len, x.q.shape[2])
    _check_padding(name, x.q, k_len, x.view.start, x.view.lengths, x.key_mask)
    check_rule(name, x.q.shape[1], alpha, pool, window, sinks, last_dense, share, lookahead)


def token_block_attention(
    x: Operands, kept: Tokens, scale: float, strip: Strip, rule: KeyBlockRule, engine: str, need_lse: bool
) -> None:
    name = "tsa::token_block_attention"
    check_operands(name, x)
    check_tokens(name, x.q, x.k, kept)
    check_rule(name, x.q.shape[1], [rule.alpha], *rule[1:])
    check_engine(name, engine, ("auto", "fused", "reference"))


def bridge_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Optional, block: int, start: Optional, lengths: Optional, key_mask: Optional,
    scale: float, width: int, rows: int, sources: int, offset: int, need_lse: bool, k_len: int | None = None,
) -> None:  # fmt: skip
    name = "tsa::bridge_attention"
    _check_attended(name, q, k, v, blocks)
    k_len = _check_length(name, q, k, KvView(blocks, block, None, None), k_len, q.shape[2])
    _check_padding(name, q, k_len, start, lengths, key_mask)
    if width < 1 or not (0 <= rows <= width and 0 <= offset < width and 0 <= sources < MAX_SOURCES):
        got = f"width {width}, rows {rows}, offset {offset} and sources {sources}"
        raise ValueError(f"{name}: rows must be 0 to width, offset 0 to width - 1, sources 0 to {MAX_SOURCES - 1}; got {got}")


def _check_attended(name: str, q: Tensor, k: Tensor, v: Tensor, blocks: Optional) -> None:
    """The shapes of one attention, whose keys may lie in a pool."""
    check_attention(name, q if blocks is None else q[:1].expand(k.shape[0], -1, -1, -1), k, v, None, causal=False)
    if v.shape[3] > MAX_HEAD_DIM:
        raise ValueError(f"{name}: the head dim of v must be at most {MAX_HEAD_DIM}, got {v.shape[3]}")


def _check_length(name: str, x: Tensor, k: Tensor, view: KvView, k_len: int | None, queries: Any) -> Any:
    """Positions of a row of the batch, of which there are as many as in `x`: no more than the view has room for, no fewer than
    queries."""
    capacity = check_view(name, x, k, view)
    if view.blocks is not None and view.blocks.device != x.device:
        raise ValueError(f"{name}: blocks must be on {x.device}, got {view.blocks.device}")
    if k_len is not None and not 0 <= k_len <= capacity:
        raise ValueError(f"{name}: k_len must be from 0 to {capacity}, for which there is room, got {k_len}")
    k_len = capacity if k_len is None else k_len
    if queries > k_len:
        raise ValueError(f"{name}: {queries} queries for {k_len} keys; queries are the last positions")
    return k_len


def _check_padding(name: str, x: Tensor, k_len: int, start: Optional, lengths: Optional, key_mask: Optional) -> None:
    """What says which keys are real fits `x` `[B, ...]`, whose device it must be on."""
    if x.device.type == "cuda" and x.dtype == torch.float64:
        raise ValueError(f"{name}: float64 runs on CPU only")
    check_view(name, x, x, KvView(None, 1, start, lengths))
    expected = (x.shape[0], k_len)
    if key_mask is None:
        return
    if key_mask.dtype != torch.bool or tuple(key_mask.shape) != expected or key_mask.device != x.device:
        raise ValueError(f"{name}: key_mask must be bool {expected} on {x.device}, got {key_mask.dtype} {tuple(key_mask.shape)}")
    if key_mask.stride(1) != 1:
        raise ValueError(f"{name}: rows of key_mask must be contiguous, got strides {key_mask.stride()}")
