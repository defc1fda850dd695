"""`tsa::padding_range` on a GPU, in one launch; in PyTorch it is six, and the host waits for a copy."""

from __future__ import annotations

import functools

import torch

from tsa_compile.kernels.common.launcher import Launch

Tensor = torch.Tensor


def mask_range(key_mask: Tensor) -> tuple[Tensor, Tensor]:
    """As `view.padding_range`: (start, lengths), int32 `[B]`, of bool `[B, Lk]`. Nothing waits for the device."""
    start, lengths = (torch.empty(key_mask.shape[0], dtype=torch.int32, device=key_mask.device) for _ in range(2))
    if key_mask.shape[0]:
        _launch(key_mask.shape, key_mask.stride())(key_mask, start, lengths)
    return start, lengths


@functools.lru_cache(maxsize=1024)
def _launch(shape: tuple[int, int], strides: tuple[int, int]) -> Launch:
    from tsa_compile.kernels.common.mask_range_device import mask_range_kernel

    return Launch(mask_range_kernel, shape[:1], (*strides, shape[1]), BLOCK=8192, num_warps=8)
