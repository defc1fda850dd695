"""Pages from host memory into a pool, on the GPU: the launch of device.py. The contract is docs/operators.md, `load_pages`."""

from __future__ import annotations

import torch

from tsa_compile.kernels.common.launcher import launch
from tsa_compile.kernels.common.sizes import next_power_of_2

Tensor = torch.Tensor


def load_pages(pool: Tensor, store: Tensor, moves: Tensor) -> None:
    """`tsa::load_pages` by Triton: one launch that reads pinned host memory over the bus. Nothing waits for the device.

    Raises:
        ValueError: the store is in host memory that is not pinned.
    """
    from tsa_compile.kernels.state.load_pages.device import load_pages_kernel

    if pool.is_cuda and not store.is_cuda and not store.is_pinned():
        raise ValueError("tsa::load_pages: store must be in pinned host memory, or on the GPU")
    number, kv_heads, dim = moves.shape[0], pool.shape[1], pool.shape[3]
    if number == 0 or dim == 0:
        return
    numbers = (*pool.stride(), *store.stride()[:3])
    sizes = {"D": dim, "BLOCK_D": next_power_of_2(dim)}
    launch(load_pages_kernel, (number, kv_heads), (pool, store, moves), numbers, **sizes, num_warps=4)
