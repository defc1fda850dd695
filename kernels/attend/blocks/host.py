"""Block-sparse attention on the GPU: launches of the choice of blocks and of the attention. docs/operators.md is the contract."""

from __future__ import annotations

import torch

from tsa_compile.kernels.attend.blocks.reference import block_sparse_attention_reference
from tsa_compile.kernels.attend.tokens.fused import new_result
from tsa_compile.kernels.attend.tokens.strip import add_strip, invert
from tsa_compile.kernels.common.launch import check_triton
from tsa_compile.kernels.common.padding import attend_padding
from tsa_compile.kernels.common.results import no_lse
from tsa_compile.kernels.common.tiles import LOG2_E, capability_of, precision, prefill_config, section_heads, small_shared
from tsa_compile.kernels.types import Attended, BlockLists, BlockRule, Keys, Operands, Strip, Tokens

Tensor = torch.Tensor
_CHUNK = 256  # masses a step


def select_blocks(x: Operands, kept: Keys, scale: float, rule: BlockRule) -> BlockLists:
    """`tsa::select_blocks` by Triton: (blocks int16 `[B, H, N, N]`, block_counts int32 `[B, H, N]`), `N = ceil(Lk / block)`.

    Nothing waits for the device. Scratch: 4 bytes a pair of blocks and head, and the pooled rows.
    Source: arXiv 2502.20766, section 3.

    Raises:
        ValueError: float64, which Triton's dot does not take.
    """
    q, k, (indices, counts), (block, pool, mass, sinks, local, dense_below) = x.q, x.k, kept, rule
    check_triton(q, k, scale, "fused")
    import triton

    from tsa_compile.kernels.attend.blocks import device

    (batch, heads, q_len, dim), k_len, lists = q.shape, k.shape[2], indices.shape[1]
    per_block, n_blocks = block // pool, triton.cdiv(k_len, block)
    n_pooled, block_d = n_blocks * per_block, max(16, triton.next_power_of_2(dim))
    new = lambda *shape, dtype=q.dtype: torch.empty(shape, dtype=dtype, device=q.device)  # noqa: E731
    queries, keys = new(batch, heads, n_pooled, dim), new(batch, lists, n_pooled, dim)
    masses = new(batch, heads, n_blocks, n_blocks, dtype=torch.float32)
    blocks = new(batch, heads, n_blocks, n_blocks, dtype=torch.int16)
    block_counts = new(batch, heads, n_blocks, dtype=torch.int32)
    if blocks.numel() == 0:
        return BlockLists(blocks, block_counts)
    lists_of = (*indices.stride()[:2],)
    sub = max(1, 64 // pool)
    for rows, pooled, skipped in ((q, queries, k_len - q_len), (k, keys, 0)):
        device.pool_rows_kernel[(triton.cdiv(n_pooled, sub) * batch * pooled.shape[1],)](
            rows, pooled, indices, counts, *rows.stride(), *lists_of, pooled.shape[1], rows.shape[1], lists, skipped, n_pooled,
            D=dim, BLOCK_D=block_d, POOL=pool, SUB=sub,
        )  # fmt: skip
    grid, columns = (n_blocks * batch * heads,), mass_columns(block_d, q.dtype, capability_of(q.device))
    device.block_mass_kernel[grid](
        queries, keys, masses, indices, counts, *lists_of, heads, lists, q_len, k_len, n_pooled, n_blocks, scale * LOG2_E,
        D=dim, BLOCK_D=block_d, POOL=pool, PER=per_block, COLS=columns, PRECISION=precision(q.dtype), num_stages=2,
    )  # fmt: skip
    device.pick_blocks_kernel[grid](
        masses, blocks, block_counts, indices, counts, *lists_of, heads, lists, q_len, k_len, n_blocks, mass, sinks, local,
        dense_below, BLOCK=block, CHUNK=_CHUNK, num_warps=1,
    )  # fmt: skip
    return BlockLists(blocks, block_counts)


def mass_columns(block_d: int, dtype: torch.dtype, capability: tuple[int, int]) -> int:
    """Pooled keys a step of `block_mass_kernel`."""
    return 32 if block_d > 128 and dtype == torch.float32 and small_shared(capability) else 64


def block_sparse_attention(
    x: Operands, kept: Tokens, lists: BlockLists, scale: float, strip: Strip, block: int, engine: str = "auto",
    need_lse: bool = False,
) -> Attended:  # fmt: skip
    """`tsa::block_sparse_attention`. Nothing waits for the device, except engine "reference".

    Raises:
        ValueError: a dtype, head dim or scale that Triton does not take.
    """
    if engine == "reference":
        return block_sparse_attention_reference(x, kept, lists, scale, strip, block, engine, need_lse)
    check_triton(x.q, x.v, scale, engine)
    has_strip = strip.reads(kept.heavy_indices)
    out, lse = new_result(x.q, x.v, has_strip, need_lse)
    if out.numel() == 0:
        return Attended(out, no_lse(x.q) if lse is None or not need_lse else lse.fill_(-torch.inf))
    _launch(x, kept, lists, out, lse, scale, block)
    if has_strip and lse is not None:
        slots = invert(kept.indices, kept.counts)
        lse = add_strip(x, out, Attended(out, lse), slots, kept.heavy_indices, strip, scale, need_lse)
    result = Attended(out, no_lse(x.q) if lse is None else lse)
    attend_padding(x, result, scale)
    return result


def _launch(x: Operands, kept: Tokens, lists: BlockLists, out: Tensor, lse: Tensor | None, scale: float, block: int) -> None:
    """Attention of the kept tokens in their blocks into `out`; `lse` None: the other rows are zeroed."""
    q, k, v, (indices, counts, _), (blocks, block_counts) = x.q, x.k, x.v, kept, lists
    import triton

    from tsa_compile.kernels.attend.blocks.device import block_prefill_kernel

    (batch, heads, q_len, dim), (kv_heads, k_len), v_dim = q.shape, k.shape[1:3], v.shape[-1]
    block_d, block_dv = (max(16, triton.next_power_of_2(d)) for d in (dim, v_dim))
    config = prefill_config(max(block_d, block_dv), q.dtype, capability_of(q.device))
    block_m, block_n = min(config.block_m, block), min(config.block_n, block)
    tiles = min(triton.cdiv(k_len, block_m), triton.cdiv(q_len, block_m) + 1)  # that hold a query
    section = section_heads(heads, kv_heads, k_len, (dim + v_dim) * q.element_size())
    block_prefill_kernel[(batch * heads * tiles,)](
        q, k, v, out, out if lse is None else lse, indices, counts, blocks, block_counts,
        *q.stride(), *k.stride(), *v.stride(), *out.stride()[:3], *indices.stride()[:2],
        heads, kv_heads, indices.shape[1], q_len, k_len, blocks.shape[-1], tiles, section, scale * LOG2_E,
        D=dim, DV=v_dim, BLOCK_D=block_d, BLOCK_DV=block_dv, BLOCK=block, BLOCK_M=block_m, BLOCK_N=block_n,
        STRIP=lse is not None, PRECISION=precision(q.dtype),
        num_warps=4 if block_m < 128 else config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
