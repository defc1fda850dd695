"""`tsa-compile bench resident`: decode steps over keys and values in host memory, a predicted part of them on the GPU.

Beside it in the same run: the same steps with nothing kept, which bring the heaviest pages of each layer anew, and the same share
of pages attended with all keys on the GPU. Caches are filled with random rows, without a prefill.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import tsa_compile as tsa
from tsa_compile.cache.entry import take_over
from tsa_compile.cache.resident import ResidentSet
from tsa_compile.kernels.common.pages import PAGE
from tsa_compile.kernels.resident import watching
from tsa_compile.kernels.types import Attended
from tsa_compile.tools.bench import steps
from tsa_compile.tools.bench.prefill import session_of

Step = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class ResidentCase:
    """What is run.

    Args:
        batch, length: requests, and tokens of each before the first step.
        keep: share of the pages that is resident, and that is attended with all keys on the GPU.
        fetched: share of the pages that each step brings where nothing is kept.
        interval: steps between two choices of the resident pages.
    """

    batch: int
    length: int
    keep: float = 0.13
    fetched: float = 0.05
    interval: int = 64


@dataclasses.dataclass(frozen=True)
class ResidentRow:
    """Milliseconds a step: means over two intervals, choices and their copies included.

    Args:
        case: what was run.
        layers: of the model.
        host_bytes: keys and values in host memory.
        resident, fetching: with the resident set; with pages brought at each step.
        on_device: with all keys on the device, `PageSparse(keep)`; None: not asked for.
        first: of the first step, which reads every page.
        bus, kernel: GB/s from pinned memory by a copy of 1 GiB, and by `tsa::load_pages`; 0 without a GPU.
        resident_bytes, fetching_bytes: to the device, a step.
        choices: of the resident set in the steps that were timed.
    """

    case: ResidentCase
    layers: int
    host_bytes: int
    resident: float
    fetching: float
    on_device: float | None
    first: float
    bus: float
    kernel: float
    resident_bytes: float
    fetching_bytes: float
    choices: int

    def __str__(self) -> str:
        c, rate = self.case, lambda ms: 1e3 * c.batch / ms
        head = f"B{c.batch} L{c.length}, {self.layers} layers, {self.host_bytes / 1e9:.1f} GB on the host"
        bus = f"bus {self.bus:.1f} GB/s by copies, {self.kernel:.1f} by load_pages"
        kept = f"{c.keep:.0%} resident: {rate(self.resident):.1f} tokens/s, {self.resident_bytes / 1e6:.1f} MB a step"
        brought = f"{c.fetched:.0%} brought at each step: {rate(self.fetching):.1f} tokens/s, {self.fetching_bytes / 1e6:.1f} MB"
        text = f"{head}; {bus}; {kept}, {self.choices} choices; {brought}, so {self.fetching / self.resident:.2f} x"
        if self.on_device is not None:
            ratio = f"{self.on_device / self.resident:.1%} of that"
            text += f"; all keys on the device: {rate(self.on_device):.1f} tokens/s, {ratio}"
        return f"{text}; first step {self.first:.0f} ms"


class FetchingSet(ResidentSet):
    """Nothing is kept but the first and the last pages: each step brings the heaviest others of each layer, and forgets them.

    Args:
        rule: of the first and the last pages.
        share: of all pages that is brought.
    """

    def __init__(self, rule: Any, share: float) -> None:
        super().__init__(rule)
        self.share, self._pages = share, 0
        self._pools: tuple[torch.Tensor, torch.Tensor] | None = None

    @contextlib.contextmanager
    def around_step(self, layers: Sequence[Any]) -> Iterator[bool]:
        self._arrive()
        if self.known:
            self._adopt(layers)
        else:
            self._pages = layers[0].host.pages
            self._begin(layers)
        by_address = {layer.buffers.keys.data_ptr(): layer for layer in layers}
        with watching(lambda q, k, scale, part: self._with_heaviest(by_address[k.data_ptr()], q, scale, part)):
            yield True

    def _with_heaviest(self, layer: Any, q: torch.Tensor, scale: float, part: Attended) -> Attended:
        """The heaviest of each segment of the host's pages, one list for all heads. Chosen on the device: the host waits for
        nothing."""
        pages, index = self._pages, (layer.sums[:, :, : self._pages], layer.counts[..., : self._pages].contiguous())
        logits, _ = torch.ops.tsa.page_scores(q, *index, None, 1, None, None, pages * PAGE, scale)
        here = self.table(q.shape[0], layer.length // PAGE, q.device)
        here = torch.where((here < 0) | (here > pages), pages, here)
        shares = torch.nn.functional.pad(torch.softmax(logits, -1).mean((1, 2)), (0, 1)).scatter(1, here, -1)
        segments = [s for s in layer.host.segments if s.first < pages]
        ends = [min(s.end, pages) for s in segments]
        numbers = [math.ceil(self.share * (end - s.first)) for s, end in zip(segments, ends, strict=True)]
        keys, values = self._pools_for(layer, sum(numbers) * PAGE)
        for n, (segment, end) in enumerate(zip(segments, ends, strict=True)):
            heaviest = shares[:, segment.first : end].topk(numbers[n]).indices
            rows, slots = (torch.arange(size, device=q.device) for size in heaviest.shape)
            moves = torch.stack(torch.broadcast_tensors(rows[:, None], heaviest, slots + sum(numbers[:n])), -1)
            torch.ops.tsa.load_pages(keys, segment.keys, moves.flatten(0, 1).int())
            torch.ops.tsa.load_pages(values, segment.values, moves.flatten(0, 1).int())
        self.counts.to_device += q.shape[0] * sum(numbers) * layer.host.page_bytes
        out, lse, _ = torch.ops.tsa.decode_attention(q, keys, values, None, 1, None, None, None, scale, causal=False)
        return Attended(*torch.ops.tsa.merge(*part, out, lse))

    def _pools_for(self, layer: Any, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._pools is None or self._pools[0].shape[2] != rows:
            keys, values = (x.new_zeros(*x.shape[:2], rows, x.shape[3]) for x in layer.buffers[:2])
            self._pools = keys, values
        return self._pools


def bench_resident(model: Any, case: ResidentCase, on_device: bool = True) -> ResidentRow:
    """The model is as it was afterwards.

    Args:
        model: of transformers, on a GPU (on a CPU, "pinned" memory is plain, and rates are 0).
        case: what is run.
        on_device: also with all keys on the device, which must have room for them.
    """
    bus, kernel = bus_rates(model) if model.device.type == "cuda" else (0.0, 0.0)
    with _transformed(model, tsa.Resident(keep=case.keep, interval=case.interval)) as policy:
        cache = filled(model, case, policy)
        host = sum(layer.host.nbytes for layer in cache.layers)
        step, counts = _stepper(model, cache, case), cache.layers[0].resident.counts
        first = _ms(step, model, 1)
        _ms(step, model, case.interval + 3)  # the first choice, and a recording
        before = dataclasses.replace(counts)
        resident = _ms(step, model, 2 * case.interval)
        choices, moved = counts.refreshes - before.refreshes, (counts.to_device - before.to_device) / (2 * case.interval)
        del cache, step
    with _transformed(model, tsa.Resident(pages=5, interval=case.interval)) as policy:
        cache = filled(model, case, policy)
        fetching = FetchingSet(policy.keeping(), case.fetched)
        for layer in cache.layers:
            layer.resident = fetching
        step = _stepper(model, cache, case)
        _ms(step, model, 3)
        before = fetching.counts.to_device
        each = _ms(step, model, case.interval)
        brought = (fetching.counts.to_device - before) / case.interval
        del cache, step
    dense = None
    if on_device:
        with _transformed(model, tsa.PageSparse(keep=case.keep)):
            step = _stepper(model, steps.filled(model, steps.StepCase(case.batch, case.length, case.keep)), case)
            _ms(step, model, 5)
            dense = _ms(step, model, case.interval)
    layers = model.config.num_hidden_layers
    return ResidentRow(case, layers, host, resident, each, dense, first, bus, kernel, moved, brought, choices)


def filled(model: Any, case: ResidentCase, policy: tsa.Resident) -> Any:
    """A cache in host memory, its rows random; each layer's are written at once."""
    from transformers import DynamicCache

    config = model.config
    cache: Any = DynamicCache(config=config)
    take_over(cache, session_of(model).steps.pool, keeping=policy.keeping())
    shape = (case.batch, config.num_key_value_heads, case.length, config.head_dim)
    with torch.no_grad():
        for layer in cache.layers:
            layer.update(*(torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2)))
    return cache


def bus_rates(model: Any) -> tuple[float, float]:
    """GB/s from pinned memory to the device: by a copy of 1 GiB, and by `tsa::load_pages` of as much."""
    store = torch.empty(1, 1 << 13, 8, PAGE, 512, dtype=torch.bfloat16, pin_memory=True)
    pool = torch.empty(1, 8, PAGE << 13, 512, dtype=torch.bfloat16, device=model.device)
    pages = torch.arange(1 << 13, dtype=torch.int32, device=model.device)
    moves = torch.stack([torch.zeros_like(pages), pages, pages], 1)
    copy = _ms(lambda: pool.view(store.shape).copy_(store, non_blocking=True), model, 3)
    kernel = _ms(lambda: torch.ops.tsa.load_pages(pool, store, moves), model, 3)
    return store.nbytes / copy / 1e6, store.nbytes / kernel / 1e6


@contextlib.contextmanager
def _transformed(model: Any, policy: Any) -> Iterator[Any]:
    tsa.transform(model, tsa.Plan(prefill=tsa.Dense(), decode=policy))
    try:
        yield policy
    finally:
        tsa.restore(model)


def _stepper(model: Any, cache: Any, case: ResidentCase) -> Step:
    return steps.stepper(model, cache, torch.randint(0, model.config.vocab_size, (case.batch, 1), device=model.device))


def _ms(work: Step, model: Any, times: int) -> float:
    """Wall milliseconds a call, of so many in a row."""
    wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return 1e3 * (time.perf_counter() - begin) / times
