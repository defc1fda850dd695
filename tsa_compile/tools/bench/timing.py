"""GPU times by CUDA events, times of launches by the clock, and the ceilings of the GPU measured in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

GRAPHED_BELOW = 16384  # tokens: of shorter prompts, launches would hide what the kernels take, so CUDA graphs are timed


def median_ms(work: Callable[[], Any], repeats: int = 9, warmup: int = 2) -> float:
    """Median time of `work()` in milliseconds, launches included."""
    return in_turns((work,), repeats, warmup)[0]


def in_turns(works: Sequence[Callable[[], Any]], repeats: int = 9, warmup: int = 2) -> list[float]:
    """`median_ms` of each; all take their turn, call by call and every second time in reverse, as a warm GPU slows down."""
    for work in [*works] * warmup:
        work()
    pairs = [[[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)] for _ in works]
    for turn in range(repeats):
        timed = list(zip(works, pairs, strict=True))
        for work, events in timed if turn % 2 == 0 else reversed(timed):
            events[turn][0].record()
            work()
            events[turn][1].record()
    torch.cuda.synchronize()
    return [statistics.median(start.elapsed_time(end) for start, end in events) for events in pairs]


def graph_ms(work: Callable[[], Any], repeats: int = 9) -> float:
    """Median time of a CUDA graph of `work()`, in milliseconds: no launch gaps."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return median_ms(graph.replay, repeats)


def launched_ms(work: Callable[[], Any], calls: int = 32, rounds: int = 5) -> float:
    """Milliseconds a call, of calls launched one after the other from Python: the GPU's time, or the host's if that is longer."""
    for _ in range(3):
        work()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times) / calls


def peak_extra_bytes(work: Callable[[], Any]) -> int:
    """Device memory that `work()` allocates at its peak, its result included."""
    work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def ceilings() -> dict[str, float]:
    """What this GPU reaches now: bf16 matrix product (TFLOP/s, 8192^3) and device copy (TB/s, read + write, 2 GiB)."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = median_ms(lambda: a @ b)
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    copy = median_ms(lambda: target.copy_(source))
    return {"gemm_tflops": 2 * 8192**3 / product / 1e9, "copy_tbps": 2 * source.nbytes / copy / 1e9}


def check_gpu() -> None:
    """Raises a ValueError where there is no GPU to time."""
    if not torch.cuda.is_available():
        raise ValueError("the benchmarks time a GPU, and PyTorch sees none")


def gpu_and_versions() -> tuple[dict[str, float], dict[str, str]]:
    """(`ceilings`, `environment`), after `check_gpu`."""
    check_gpu()
    return ceilings(), environment()


def environment() -> dict[str, str]:
    """GPU and versions, as every reported number needs them."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
    }
