"""Launch of the window scores for compute capability 9.0 (hopper_device.py)."""

from __future__ import annotations

import functools

import torch

Tensor = torch.Tensor
BLOCK, MAX_SPLITS = 128, 32  # as the kernels have them
HEAD_DIMS = (64, 128)
_SHARED_TILES = 196_608  # bytes for tiles of queries and keys


def takes(q: Tensor, k: Tensor, window: int) -> bool:
    """Whether the kernels run this call: Hopper, half precision, head dim 64 or 128, one tile of queries, aligned rows."""
    return (
        q.device.type == "cuda"
        and torch.cuda.get_device_capability(q.device) == (9, 0)
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] in HEAD_DIMS
        and window <= BLOCK
        and all(_aligned(x) for x in (q, k))
    )


def _aligned(x: Tensor) -> bool:
    *outer, last = x.stride()
    return last == 1 and x.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in outer)


def tiles(group: int, dim: int, element_size: int) -> tuple[int, int]:
    """(heads of a group that a program scores together, stages of its ring of key tiles)."""
    together = next(n for n in (4, 2, 1) if group % n == 0)
    return together, min(4, _SHARED_TILES // (BLOCK * dim * element_size) - together)


def launch(
    q: Tensor, k: Tensor, order: Tensor, ranks: Tensor, padded: bool, scale_log2: float, window: int, mean: Tensor
) -> None:
    """Mean attention of the last `window` queries to each key before the window, to `mean` float32 `[B, H, Lk]` by rank."""
    import triton

    from tsa_compile.kernels.token_scores.hopper_device import WARPS, score_lse_hopper_kernel, score_mean_hopper_kernel

    (batch, heads, q_len, dim), (kv_heads, k_len) = q.shape, k.shape[1:3]
    together, stages = tiles(heads // kv_heads, dim, q.element_size())
    programs = max(1, batch * heads // together)
    splits = max(1, min(_multiprocessors(q.device) // programs, MAX_SPLITS))
    span = triton.cdiv(triton.cdiv(k_len, splits), BLOCK) * BLOCK
    splits = triton.cdiv(k_len, span)
    part = torch.empty(2, batch, heads, splits, window, dtype=torch.float32, device=q.device)
    strides = (*q.stride()[:3], *k.stride()[:3])
    sizes = (heads, kv_heads, q_len, k_len, window, splits, span, scale_log2)
    shape = {"D": dim, "HEADS": together, "STAGES": stages, "PADDED": padded, "num_warps": WARPS.value}
    grid = (programs, splits)
    score_lse_hopper_kernel[grid](q, k, part[0], part[1], order, ranks, *strides, *sizes, **shape)
    score_mean_hopper_kernel[grid](q, k, part[0], part[1], mean, order, ranks, *strides, *sizes, **shape)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
