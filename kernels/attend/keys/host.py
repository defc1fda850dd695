"""Attention to kept keys on the GPU: the launch of device.py. The contract is docs/operators.md, `key_attention`."""

from __future__ import annotations

import torch

from tsa_compile.kernels.common.launcher import launch
from tsa_compile.kernels.common.results import empty_result, no_lse
from tsa_compile.kernels.common.sizes import cdiv, next_power_of_2
from tsa_compile.kernels.common.tiles import LOG2_E, Config, capability_of, precision, prefill_config, small_shared
from tsa_compile.kernels.types import Attended, Keys, Operands

Tensor = torch.Tensor


def key_attention(x: Operands, kept: Keys, scale: float, need_lse: bool = False) -> Attended:
    """softmax(scale q k^T) v over each head's kept keys, for every query.

    Args:
        x: q, k, v in fp16, bf16 or fp32, any strides.
        kept: from `select_keys` or `remember_keys`, whose lists have room for fewer keys: no more of them is packed.
        scale: positive factor of the scores.
        need_lse: whether the log-sum-exp is returned.

    Returns:
        Zero, and -inf, in a row of the batch without a kept key. Scratch: K and V of each list.

    Raises:
        ValueError: float64, or a scale that is not positive. Nothing here waits for the device.
    """
    q, k, v, (indices, counts) = x.q, x.k, x.v, kept
    if q.dtype == torch.float64 or scale <= 0:
        raise ValueError(f"tsa::key_attention on a GPU takes no float64 and a positive scale, got {q.dtype} and {scale}")
    from tsa_compile.kernels.attend.keys.device import key_attention_kernel, pack_keys_kernel

    (batch, heads, q_len, dim), kv_heads, v_dim, (lists, capacity) = q.shape, k.shape[1], v.shape[3], indices.shape[1:]
    out = empty_result(q, v)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device) if need_lse else None
    if out.numel() == 0:
        return Attended(out, no_lse(q) if lse is None else lse.fill_(-torch.inf))
    packed_k, packed_v = (x.new_empty(batch, lists, capacity, x.shape[3]) for x in (k, v))
    block_d, block_dv = (max(16, next_power_of_2(x)) for x in (dim, v_dim))
    shape = {"D": dim, "DV": v_dim, "BLOCK_D": block_d, "BLOCK_DV": block_dv}
    if capacity:
        launch(
            pack_keys_kernel, (cdiv(capacity, 64) * batch * lists,), (k, v, packed_k, packed_v, indices, counts),
            (*k.stride(), *v.stride(), *indices.stride()[:2], kv_heads, lists, capacity), **shape, BLOCK=64,
        )  # fmt: skip
    config = key_config(max(block_d, block_dv), q.dtype, capability_of(q.device))
    tiles = cdiv(q_len, config.block_m)
    launch(
        key_attention_kernel, (batch * heads * tiles,), (q, packed_k, packed_v, out, counts, lse),
        (*q.stride(), *out.stride()[:3], heads, lists, q_len, capacity, tiles, scale * LOG2_E), **shape,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, PRECISION=precision(q.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return Attended(out, no_lse(q) if lse is None else lse)


def key_config(block_d: int, dtype: torch.dtype, capability: tuple[int, int]) -> Config:
    """Tiles and warps by head dim and dtype, chosen on an H200; never by length."""
    if small_shared(capability) and dtype == torch.float32 and block_d > 64:
        return Config(32, 16, 4, 2) if block_d <= 128 else Config(16, 16, 4, 2)
    if small_shared(capability) and block_d > 128:
        return Config(64, 32, 4, 2)
    if dtype != torch.float32 and block_d != 128:
        return Config(64, 64, 4, 3) if block_d <= 64 else Config(64, 64, 8, 2)
    return prefill_config(block_d, dtype, capability)
