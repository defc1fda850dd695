"""Decode attention on the GPU: the launches of device.py. The contract is docs/operators.md, `decode_attention`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tsa_compile.kernels.attend.decode.config import DecodeConfig, decode_config
from tsa_compile.kernels.common import launcher
from tsa_compile.kernels.common.launch import constant, multiprocessors, split_count
from tsa_compile.kernels.common.results import score_dtype
from tsa_compile.kernels.common.sizes import cdiv, next_power_of_2
from tsa_compile.kernels.common.tiles import capability_of, precision
from tsa_compile.kernels.common.view import capacity_of
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor
PAGE = 16
MERGED_AT_ONCE = 64  # parts of a query row


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor | None,
    block: int,
    start: Tensor | None,
    lengths: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    window: int = 0,
    causal: bool = True,
    scores: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`tsa::decode_attention` by Triton: (out, lse, scores). Nothing waits for the device; no length compiles anything."""
    view = KvView(blocks, block, start, lengths)
    capacity = capacity_of(k, view)
    shape = (q.shape[0], q.shape[1], 2 if scores else 0, capacity)
    dumped = q.new_empty(shape, dtype=score_dtype(q.dtype))
    longest = min(capacity, window + q.shape[2]) if window else capacity
    masks = (mask, sinks, softcap, window, causal)
    out, lse = launch(q, k, v, view, key_mask, scale, masks, longest, None, dumped if scores else None)
    return out, lse, dumped


def page_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    blocks: Tensor | None,
    block: int,
    start: Tensor | None,
    lengths: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    causal: bool = True,
    windows: Sequence[int] | None = None,
    first_keys: int = 0,
) -> tuple[Tensor, Tensor]:
    """`tsa::page_attention` by Triton: `decode_attention` of the pages in each KV head's list."""
    masks = (mask, sinks, softcap, 0, causal)
    view = KvView(blocks, block, start, lengths)
    by_head = None if windows is None else (constant(tuple(windows), torch.int32, q.device), first_keys)
    return launch(q, k, v, view, key_mask, scale, masks, indices.shape[2] * PAGE, (indices, counts), None, windows=by_head)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    view: KvView,
    key_mask: Tensor | None,
    scale: float,
    masks: tuple[Tensor | None, Tensor | None, float, int, bool],
    longest: int,
    pages: tuple[Tensor, Tensor] | None,
    dumped: Tensor | None,
    config: DecodeConfig | None = None,
    splits: int | None = None,
    windows: tuple[Tensor, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Both kernels; (out, lse).

    Args:
        masks: mask, sinks, softcap, window, causal.
        longest: keys that a row of the batch reads at most.
        pages: indices and counts of the lists; None: every key.
        dumped: takes the scores of the first and the last row; None: not asked for.
        windows: int32 `[H]`, as `tsa::page_attention` has them, and its `first_keys`; None: heads see every key.
        config, splits: for measurements; None: as chosen for this GPU.
    """
    from tsa_compile.kernels.attend.decode.device import decode_kernel
    from tsa_compile.kernels.common.splits_device import merge_kernel

    (batch, heads, rows, dim), kv_heads, v_dim = q.shape, k.shape[1], v.shape[3]
    mask, sinks, softcap, window, causal = masks
    group = heads // kv_heads
    block_d, block_dv = (max(16, next_power_of_2(x)) for x in (dim, v_dim))
    given = mask is not None, pages is not None, dumped is not None
    config = config or decode_config(group * rows, block_d, block_dv, q.dtype, capability_of(q.device), *given)
    tiles_m = cdiv(group * rows, config.block_m)
    programs = batch * kv_heads * tiles_m
    out = q.new_empty(batch, rows, heads, v_dim).transpose(1, 2)
    lse = q.new_empty(batch, heads, rows, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    processors = multiprocessors(q.device) if q.is_cuda else 4  # the interpreter
    splits = splits or split_count(programs, max(1, cdiv(longest, config.block_n)), config.resident * processors)
    one = splits == 1
    part, part_lse = (lse, lse) if one else _parts(q, rows * heads * batch * splits, v_dim)
    bias = None if mask is None else mask.expand(batch, heads, rows, mask.shape[3])
    indices, counts = pages or (None, None)
    tensors = (
        q, k, v, out, lse, part, part_lse, view.blocks, view.start, view.lengths, key_mask, bias, sinks, indices, counts, dumped,
        None if windows is None else windows[0],
    )  # fmt: skip
    numbers = (
        *q.stride(), *k.stride(), *v.stride(), *out.stride()[:3],
        *_strides(key_mask, 2), *_strides(bias, 4), *_strides(indices, 2), *_strides(view.blocks, 1),
        0 if dumped is None else dumped.shape[3],
        kv_heads, group, rows, capacity_of(k, view), window, view.block, max(1, k.shape[2] // view.block), splits, tiles_m,
        0 if windows is None else windows[1], scale, softcap,
    )  # fmt: skip
    launcher.launch(
        decode_kernel, (programs, splits), tensors, numbers,
        D=dim, DV=v_dim, BLOCK_D=block_d, BLOCK_DV=block_dv, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        CAUSAL=causal, CAPPED=softcap > 0, ONE=one, PRECISION=precision(q.dtype), SWAP=config.swap,
        BLOCK_E=max(16, next_power_of_2(2 * group)),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if not one:
        launcher.launch(
            merge_kernel, (batch * heads * rows,), (part, part_lse, out, lse, sinks), (*out.stride()[:3], heads, rows, splits),
            DV=v_dim, BLOCK_DV=block_dv, BLOCK_S=MERGED_AT_ONCE, num_warps=4 if block_dv <= 128 else 8,
        )  # fmt: skip
    return out, lse


def _parts(q: Tensor, number: int, v_dim: int) -> tuple[Tensor, Tensor]:
    """Scratch: the parts of all query rows, and their log-sum-exps."""
    return q.new_empty(number, v_dim, dtype=torch.float32), q.new_empty(number, dtype=torch.float32)


def _strides(x: Tensor | None, n: int) -> tuple[int, ...]:
    """The first `n` strides; 0 where there is no tensor."""
    return (0,) * n if x is None else x.stride()[:n]
