"""Block sizes and warps of the Triton kernels, by head dim, dtype and GPU; never by length, so no length recompiles.

Chosen on an H200 (docs/measured/notebook.md); where nothing was measured, the largest tiles that fit shared memory.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

LOG2_E = 1.4426950408889634


class Config(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # a thread; None: as many as the compiler takes

    @property
    def options(self) -> dict[str, int]:
        """What Triton takes them as."""
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}


def small_shared(capability: tuple[int, int]) -> bool:
    """Whether a program has 101,376 bytes of shared memory (capability 8.6, 8.9, 12.x), and not 166,912 (8.0) or more."""
    return capability in ((8, 6), (8, 9)) or capability[0] == 12


def prefill_config(block_d: int, dtype: torch.dtype, capability: tuple[int, int]) -> Config:
    """For `sparse_prefill_kernel`; block_d: the larger head dim, rounded up to a power of two."""
    # Three stages: positions are read one block before the rows that they name; with two, 239 instead of 387 TFLOP/s.
    if dtype == torch.float32 and block_d > 64 and small_shared(capability):
        return Config(64, 16, 4, 3) if block_d <= 128 else Config(16, 16, 4, 2)
    if dtype == torch.float32:
        return Config(64, 32, 4, 3) if block_d <= 128 else Config(32, 16, 4, 3)
    if capability[0] == 9:
        return Config(128, 128, 8, 3) if block_d <= 128 else Config(128, 64, 8, 3)
    if block_d <= 128:
        return Config(128, 64, 4 if block_d <= 64 else 8, 3)
    return Config(64, 32, 4, 3)


def strip_config(block_d: int, dtype: torch.dtype, capability: tuple[int, int]) -> Config:
    """For `strip_kernel`: short loops, so smaller tiles and several programs on a multiprocessor."""
    if dtype == torch.float32 and block_d > 64 and small_shared(capability):
        return Config(64, 16, 4, 2) if block_d <= 128 else Config(16, 16, 4, 2)
    if dtype == torch.float32:
        return Config(64, 32, 4, 2) if block_d <= 128 else Config(32, 16, 4, 2)
    if capability[0] == 9 and block_d <= 128:
        return Config(64, 32, 4, 2, 168)  # three programs on a multiprocessor
    return Config(64, 64, 4, 2) if block_d <= 128 else Config(64, 32, 4, 2)


def section_heads(heads: int, kv_heads: int, k_len: int, row_bytes: int) -> int:
    """Query heads that advance together, so that their keys and values (row_bytes a token) fit 32 MB of L2.

    All of them while they fit, which also starts the longest tiles of all heads first; a divisor of `heads`.
    """
    fit = max(1, (32 << 20) // max(1, k_len * row_bytes))
    kv_section = max(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n <= max(fit, 1))
    return kv_section * (heads // kv_heads)


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability of an NVIDIA GPU; (9, 0) for CPU tensors, which only Triton's interpreter takes.

    (0, 0) on ROCm, whose GPUs are "cuda" devices too and count their generations in the same numbers: (9, 0) is no Hopper there.
    """
    if torch.version.hip is not None:
        return (0, 0)
    return _capability(device) if device.type == "cuda" else (9, 0)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies: three tf32 products carry float32's digits at a multiple of the speed of ieee."""
    return "tf32x3" if dtype == torch.float32 else "ieee"
