"""`tsa::block_sparse_attention`: the three operations of block-sparse prefill in one call. docs/operators.md is the contract."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from tsa_compile.kernels.attend.pages.host import attend
from tsa_compile.kernels.attend.pages.reference import key_block_attention_reference
from tsa_compile.kernels.common.row_blocks import FLAGS
from tsa_compile.kernels.common.view import length_of
from tsa_compile.kernels.score.page_mass.host import key_block_means
from tsa_compile.kernels.score.page_mass.reference import key_block_means_reference
from tsa_compile.kernels.select.threshold_pages.host import select_key_blocks
from tsa_compile.kernels.select.threshold_pages.reference import select_key_blocks_reference
from tsa_compile.kernels.types import Operands

Tensor = torch.Tensor


def block_sparse_attention(
    x: Operands, k_len: int | None, scale: float, alpha: Sequence[float], pool: int, window: int, sinks: int, last_dense: int,
    share: str, lookahead: bool,
) -> Tensor:  # fmt: skip
    """On a GPU. Where every key is read, a whole prompt without padding goes to PyTorch's SDPA. Nothing waits for the device."""
    if not any(alpha) and _is_plain(x):
        return _dense(x, scale)
    (blocks, block, start, lengths, _), mask = x.view, x.key_mask
    k_len = length_of(x.k, x.view, k_len)
    flags = x.q.new_empty(FLAGS + x.q.shape[0], dtype=torch.int32)
    means, counts = key_block_means(x.k, start, lengths, mask, blocks, block, k_len)
    bits = select_key_blocks(
        x.q, means, counts, start, lengths, mask, k_len, scale, alpha, pool, window, sinks, last_dense, share, lookahead, flags
    )
    return attend(x.q, x.k, x.v, None, bits, x.view, mask, k_len, scale, flags)


def block_sparse_attention_reference(x: Operands, k_len: int | None, scale: float, alpha: Sequence[float], *rule: Any) -> Tensor:
    """On any device."""
    bits = _chosen(*_REFERENCES, x, k_len, scale, alpha, *rule)
    view, mask = x.view[:4], x.key_mask
    out: Tensor = key_block_attention_reference(x.q, x.k, x.v, bits, *view, mask, scale, False, k_len=k_len)[0]
    return out


def chosen_blocks(x: Operands, k_len: int | None, scale: float, alpha: Sequence[float], *rule: Any) -> Tensor:
    """The bitmap of the key blocks that are read, as `tsa::select_key_blocks` returns it."""
    stages = (key_block_means, select_key_blocks) if x.q.is_cuda else _REFERENCES
    return _chosen(*stages, x, k_len, scale, alpha, *rule)


_REFERENCES = (key_block_means_reference, select_key_blocks_reference)


def _chosen(means_of: Callable[..., Any], select: Callable[..., Tensor], x: Operands, k_len: int | None, *rule: Any) -> Tensor:
    """rule: as `select` takes it."""
    padding = (x.view.start, x.view.lengths, x.key_mask)
    means = means_of(x.k, *padding, x.view.blocks, x.view.block, k_len)
    return select(x.q, *means, *padding, length_of(x.k, x.view, k_len), *rule)


def _is_plain(x: Operands) -> bool:
    """Is it what `scaled_dot_product_attention(is_causal=True)` computes by a fused kernel?"""
    return x.key_mask is None and x.view.is_identity and x.q.shape[2] == x.k.shape[2] and x.q.shape[3] == x.v.shape[3]


def _dense(x: Operands, scale: float) -> Tensor:
    """Stored as every attention's result is."""
    out = F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True, scale=scale, enable_gqa=x.q.shape[1] != x.k.shape[1])
    return out.transpose(1, 2).contiguous().transpose(1, 2)
