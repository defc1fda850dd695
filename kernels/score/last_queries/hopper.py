"""Launch of the scores by the last queries for compute capability 9.0 (hopper_device.py)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from tsa_compile.kernels.common.launch import multiprocessors
from tsa_compile.kernels.common.launcher import Launch
from tsa_compile.kernels.common.sizes import cdiv, next_power_of_2
from tsa_compile.kernels.common.tiles import capability_of

Tensor = torch.Tensor
Shape = tuple[int, ...]
BLOCK, MAX_SPLITS = 128, 32  # as the kernels have them
HEAD_DIMS = (64, 128)
_SHARED_TILES = 196_608  # bytes for tiles of queries and keys


def takes(q: Tensor, k: Tensor, last_queries: int) -> bool:
    """Whether the kernels run this call: Hopper, half precision, head dim 64 or 128, one tile of queries, aligned rows."""
    return (
        q.device.type == "cuda"
        and capability_of(q.device) == (9, 0)
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] in HEAD_DIMS
        and last_queries <= BLOCK
        and all(_aligned(x) for x in (q, k))
    )


def _aligned(x: Tensor) -> bool:
    *outer, last = x.stride()
    return last == 1 and x.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in outer)


def tiles(group: int, dim: int, element_size: int) -> tuple[int, int]:
    """(heads of a group that a program scores together, stages of its ring of key tiles)."""
    together = 2 if group % 2 == 0 else 1  # four leave too few registers for both passes in one kernel
    return together, min(4, _SHARED_TILES // (BLOCK * dim * element_size) - together)


def launch(
    q: Tensor,
    k: Tensor,
    order: Tensor,
    ranks: Tensor,
    padded: bool,
    scale_log2: float,
    last_queries: int,
    mean: Tensor,
    through: Tensor,
) -> None:
    """Mean attention of the last queries to each key before them, to `mean` float32 `[B, H, Lk]` by rank.

    through: int32 `[B * H]`, zero.
    """
    plan = _plan(
        q.device, q.element_size(), q.shape, k.shape, q.stride()[:3], k.stride()[:3], padded, scale_log2, last_queries,
        multiprocessors(q.device),
    )  # fmt: skip
    tensors = (q, k, *torch.empty(plan.part, dtype=torch.float32, device=q.device), through, mean, order, ranks)
    if _run_at_once(plan.at_once.grid, multiprocessors(q.device)) and q.device not in _REFUSED:
        try:
            return plan.at_once(*tensors)
        except RuntimeError as error:
            if "cooperative" not in str(error):
                raise
            _REFUSED.add(q.device)
    for run in plan.in_turns:
        run(*tensors)


class _Plan(NamedTuple):
    """Launches over operands of one shape.

    Args:
        part: shape of what the first pass leaves to the second.
        at_once: both passes, whose programs wait for each other.
        in_turns: one pass each.
    """

    part: Shape
    at_once: Launch
    in_turns: tuple[Launch, Launch]


@functools.lru_cache(maxsize=1024)
def _plan(
    device: torch.device, element_size: int, q: Shape, k: Shape, q_strides: Shape, k_strides: Shape, padded: bool,
    scale_log2: float, last_queries: int, processors: int,
) -> _Plan:  # fmt: skip
    from tsa_compile.kernels.score.last_queries.hopper_device import score_hopper_kernel
    from tsa_compile.kernels.score.last_queries.hopper_ring_device import WARPS

    (batch, heads, q_len, dim), (kv_heads, k_len) = q, k[1:3]
    together, stages = tiles(heads // kv_heads, dim, element_size)
    programs = max(1, batch * heads // together)
    most = max(1, min(processors // programs, MAX_SPLITS))
    span = cdiv(cdiv(k_len, most), BLOCK) * BLOCK
    splits = cdiv(k_len, span)
    numbers = (*q_strides, *k_strides, heads, kv_heads, q_len, k_len, last_queries, splits, span, scale_log2)
    shape = {"D": dim, "HEADS": together, "STAGES": stages, "PADDED": padded, "num_warps": WARPS.value}
    made = functools.partial(Launch, score_hopper_kernel, (programs, splits), numbers, **shape)
    at_once = made(SPLITS=next_power_of_2(most), LSE=True, MEAN=True, launch_cooperative_grid=True)
    first, second = (made(SPLITS=MAX_SPLITS, LSE=lse, MEAN=not lse) for lse in (True, False))
    return _Plan((2, batch, heads, splits, last_queries), at_once, (first, second))


#: GPUs of which this process has fewer multiprocessors than they have (green contexts, MPS), so that a cooperative launch failed
#: once: nothing was run then, and two launches do the same.
_REFUSED: set[torch.device] = set()


def _run_at_once(grid: Shape, processors: int) -> bool:
    """Whether all programs have a multiprocessor of their own, so that they can wait for each other."""
    return grid[0] * grid[1] <= processors
