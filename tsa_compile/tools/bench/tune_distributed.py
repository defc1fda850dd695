"""`tsa-compile tune --distributed`, on every rank of a torchrun job: the numbers of `cache/route_cost.py`."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tsa_compile.cache.route_cost import Link, Work, seconds
from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.common.group import default_group, gather, rank_and_size

SMALL, LARGE = 1 << 18, 1 << 23  # bytes of a message


def start() -> torch.device:
    """Join the torchrun job: NCCL and a GPU for each rank where there are as many GPUs, gloo otherwise."""
    on_gpus = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpus else "gloo")
    if not on_gpus:
        return torch.device("cpu")
    device = torch.device("cuda", dist.get_node_local_rank())
    torch.cuda.set_device(device)
    return device


def measure(device: torch.device, heads: int = 8, kv_heads: int = 2, dim: int = 64, tokens: int = 4096) -> Link:
    """The default group's numbers, the same on every rank; `recompute` is left out: it is the model's.

    Args:
        device: of this rank.
        heads, kv_heads, dim, tokens: of the attention that is timed, in bfloat16 on GPUs and float32 elsewhere.
    """
    group, dtype = default_group(), torch.bfloat16 if device.type == "cuda" else torch.float32
    q = torch.randn(1, heads, 1, dim, dtype=dtype, device=device)
    k = torch.randn(1, kv_heads, tokens, dim, dtype=dtype, device=device)
    whole = tokens * rank_and_size(group)[1]
    part = torch.ops.tsa.decode_attention(q, k, k, None, 1, None, None, None, 1.0)[:2]
    small, large = (torch.zeros(n, dtype=torch.uint8, device=device) for n in (SMALL, LARGE))
    attend = median(lambda: torch.ops.tsa.decode_attention(q, k, k, None, 1, None, None, None, 1.0), device)
    exchange = median(lambda: route(q, k[:, :, :16], group), device)
    per_byte = (median(lambda: gather(large, group), device) - median(lambda: gather(small, group), device)) / (LARGE - SMALL)
    fetch = median(lambda: torch.ops.tsa.gather_rows(k, whole, group), device)
    splice = max(0.0, fetch - median(lambda: gather(k, group), device)) / whole
    merge = median(lambda: torch.ops.tsa.merge(*part, *part), device)
    numbers = torch.tensor([exchange, per_byte, attend / tokens, merge, splice], dtype=torch.float64, device=device)
    probe, per_byte, attend, merge, splice = gather(numbers, group).amax(0).tolist()  # of the slowest rank
    return Link(probe, 1 / max(per_byte, 1e-15), attend, merge, splice)


def predicted_and_measured(
    link: Link, device: torch.device, rows: int, tokens: int, heads: int = 8, kv_heads: int = 2, dim: int = 64
) -> Any:
    """Seconds of one routed attention of so many rows: what `link` says, what it takes."""
    group, dtype = default_group(), torch.bfloat16 if device.type == "cuda" else torch.float32
    ranks = rank_and_size(group)[1]
    q = torch.randn(rows, heads, 1, dim, dtype=dtype, device=device)
    k = torch.randn(1, kv_heads, tokens // ranks, dim, dtype=dtype, device=device).expand(rows, -1, -1, -1)
    work = Work(rows, tokens, ranks, 1, 1, heads, kv_heads, dim, q.element_size())
    return seconds(link, work)["route"], median(lambda: route(q, k, group), device)


def route(q: torch.Tensor, k: torch.Tensor, group: str) -> Any:
    return torch.ops.tsa.routed_attention(q, k, k, None, None, None, None, None, 1.0, False, group)


def median(work: Callable[[], Any], device: torch.device, repeats: int = 15) -> float:
    """Seconds, by the host's clock: all ranks take part in what is timed."""
    times = []
    for _ in range(repeats + 3):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[3:])
