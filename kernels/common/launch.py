"""What hosts ask before they launch a kernel: whether Triton takes the call, how large the GPU is and what fills it."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from tsa_compile.kernels.checks import MAX_HEAD_DIM

Tensor = torch.Tensor
MAX_SPLITS = 128  # parts of the keys of a KV head


def check_triton(q: Tensor, v: Tensor, scale: float, engine: str) -> None:
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"engine {engine!r} takes float16, bfloat16 and float32, not {q.dtype}")
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
        raise ValueError(f"engine {engine!r} takes head dims up to {MAX_HEAD_DIM}, not {q.shape[-1]} and {v.shape[-1]}")
    if scale <= 0:
        raise ValueError(f"engine {engine!r} takes a positive scale, not {scale}")
    if q.device.type != "cuda" and not _interpreted():
        raise RuntimeError(f"engine {engine!r} needs CUDA tensors; on {q.device.type} use 'auto' or 'reference'")


def _interpreted() -> bool:
    """Whether Triton runs kernels through its interpreter, which takes CPU tensors (TRITON_INTERPRET=1)."""
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret)


def tiles_in_yz(tiles: int) -> tuple[int, int]:
    """y and z of a grid, together at least `tiles`: each ends at 65,535."""
    deep = -(-tiles // 65535)
    return (tiles, 1) if deep <= 1 else (-(-tiles // deep), deep)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def program_slots(resident: int, device: torch.device) -> int:
    """Programs that run at a time, of which a multiprocessor holds `resident`; in the interpreter it is the only one."""
    return resident * (multiprocessors(device) if device.type == "cuda" else 1)


class IndexConfig(NamedTuple):
    """How an index of pages is cut into programs; `tsa-compile bench decode --sweep score,complete` times others.

    Args:
        num_warps, num_stages: of a program.
        resident: programs that a multiprocessor holds at a time.
    """

    num_warps: int
    num_stages: int
    resident: int


@functools.lru_cache(maxsize=256)
def constant(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers on the device; copied there once, so that no captured step copies from the host."""
    return torch.tensor(values, dtype=dtype, device=device)


@functools.lru_cache(maxsize=4096)
def split_count(programs: int, tiles: int, slots: int) -> int:
    """Parts of the keys of each KV head, so that all programs together fill whole waves of the GPU.

    The fewest parts that come within 5 % of the best filling (as the heuristic of flash-decoding).

    Args:
        programs: of one part.
        tiles: of the longest row.
        slots: programs that the GPU holds at a time.
    """
    most = max(1, min(tiles, MAX_SPLITS, 4 * slots // max(1, programs) + 1))
    filled = [_filling(programs * n, slots) for n in range(1, most + 1)]
    return next(n for n, share in enumerate(filled, 1) if share >= 0.95 * max(filled))


@functools.lru_cache(maxsize=4096)
def even_split_count(programs: int, tiles: int, slots: int) -> int:
    """Parts of each KV head's tiles, for programs of which each works on every one of its tiles: the fewest of those by which the
    GPU's longest queue of tiles is within 3 % of the shortest. Arguments as of `split_count`."""
    most = max(1, min(tiles, MAX_SPLITS))
    queue = [math.ceil(programs * n / slots) * math.ceil(tiles / n) for n in range(1, most + 1)]
    return next(n for n, length in enumerate(queue, 1) if length <= 1.03 * min(queue))


def _filling(programs: int, slots: int) -> float:
    waves = programs / slots
    return waves / math.ceil(waves)
