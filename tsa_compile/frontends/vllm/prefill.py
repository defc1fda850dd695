"""Prefill of a batch's sparse rows by a layer's policy, over the pages of the cache."""

from __future__ import annotations

import torch

from tsa_compile.frontends.vllm.rows import SparseRow, Split
from tsa_compile.kernels.common.row_blocks import KEYS, row_block_count, word_count
from tsa_compile.kernels.common.view import rows_in_order
from tsa_compile.kernels.types import KvView, Operands
from tsa_compile.passes.site import AttentionSite, MaskFacts
from tsa_compile.policies.base import Policy, call

Tensor = torch.Tensor
PROGRAMS = 8 * 160  # at most, of a kernel on one GPU


def pages(kv_cache: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """Keys and values `[blocks, Hk, block, D]` of vLLM's cache `[blocks, Hk, block, 2 D]`, in place."""
    key, value = kv_cache.split(head_size, dim=-1)
    return key, value


def sparse_prefill(
    policy: Policy, path: str, scale: float, query: Tensor, key: Tensor, value: Tensor, output: Tensor, split: Split
) -> None:
    """The sparse rows' attention, into `output`. Nothing waits for the device.

    Args:
        policy: of the layer.
        path: of its module.
        scale: factor of the scores.
        query, output: `[tokens, H, D]`, of the whole batch.
        key, value: `[blocks, Hk, block, D]`.
        split: which rows, and where their blocks are.
    """
    for row in split.rows:
        q = query[row.begin : row.end].transpose(0, 1)[None]
        k, v, view = _keys(policy, key, value, row, split.block_table)
        operands, mask = Operands(q, k, v, view=view), MaskFacts(causal=True)
        site = AttentionSite.of(operands, mask, scale, phase="prefill", module=path, k_len=row.k_len)
        out = policy.attend(call, site, policy.select(call, site, None))
        output[row.begin : row.end] = out[0].transpose(0, 1)


def _keys(policy: Policy, key: Tensor, value: Tensor, row: SparseRow, table: Tensor) -> tuple[Tensor, Tensor, KvView]:
    """The row's keys and values: in place, or in order for a policy whose operators need that."""
    block = key.shape[2]
    blocks = table[row.request : row.request + 1, : -(-row.k_len // block)]
    view = KvView(blocks, block, None, None)
    if policy.reads_blocks:
        return key, value, view
    k, v = (rows_in_order(x, view)[:, :, : row.k_len] for x in (key, value))
    return k, v, KvView(None, 1, None, None)


def reserve(policy: Policy, query: Tensor, kv_heads: int, max_tokens: int) -> None:
    """Take what a sparse row may need at most, and give it back: vLLM's memory profile then counts it.

    Args:
        policy: of the layer.
        query: `[tokens, H, D]` of the largest step.
        kv_heads: KV heads.
        max_tokens: longest row.
    """
    (tokens, heads, dim), blocks = query.shape, -(-max_tokens // KEYS)
    held = [torch.empty_like(query)]  # the result
    if policy.reads_blocks:
        held.append(query.new_empty(kv_heads, blocks, dim, dtype=torch.float32))  # means
        held.append(query.new_empty(heads, row_block_count(tokens, max_tokens) + 1, word_count(max_tokens), dtype=torch.int64))
        held.append(query.new_empty(PROGRAMS, blocks, dtype=torch.int32))  # lists of the kernel for any GPU
    else:
        held += [
            query.new_empty(kv_heads, max_tokens, dim) for _ in range(4)
        ]  # keys and values in order, and what is made of them
        held.append(query.new_empty(2, heads, max_tokens, dtype=torch.float32))
    del held
