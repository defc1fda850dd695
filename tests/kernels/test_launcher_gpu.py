"""Remembered launches on a GPU run the kernel that Triton chooses, whatever was launched before."""

import gc
import importlib.util
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime import JITFunction

from tsa_compile.kernels.common import launcher
from tsa_compile.kernels.common.launcher import Launch, launch

pytestmark = pytest.mark.gpu
BASE = {
    "dtype": torch.float32, "rows": 1000, "offset": 0, "out_offset": 0, "stride": 2, "number": 7, "scale": 0.5, "add": True,
    "BLOCK": 128, "NEGATE": False,
}  # fmt: skip
# each a kernel of its own to Triton, or the first one's: by dtype, by multiples of 16 (bytes of addresses; numbers), by numbers
# that are 1, by 32 or 64 bits, by constants and options
CHANGED = (
    {}, {"dtype": torch.float16}, {"dtype": torch.bfloat16}, {"dtype": torch.int32},
    {"offset": 1}, {"offset": 3, "dtype": torch.float16}, {"offset": 4}, {"out_offset": 1}, {"offset": 1, "out_offset": 1},
    {"stride": 1}, {"stride": 1, "offset": 1}, {"stride": 16}, {"stride": 17},
    {"rows": 1}, {"rows": 16}, {"rows": 4096}, {"rows": 1001},
    {"number": 1}, {"number": 16}, {"number": 1 << 40}, {"number": (1 << 40) + (1 << 31) + 1}, {"number": -(1 << 35)},
    {"scale": 1}, {"scale": 1.0}, {"scale": 2}, {"add": False},
    {"BLOCK": 64}, {"NEGATE": True}, {"num_warps": 1}, {"num_warps": 8, "BLOCK": 1024},
)  # fmt: skip


@triton.jit
def mix_kernel(x, add, out, rows, x_s, number, scale, BLOCK: tl.constexpr, NEGATE: tl.constexpr):
    """Whole numbers and halves, so that nothing is rounded; of `number` what 32 bits do not hold, too."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mixed = tl.load(x + at * x_s, mask=at < rows, other=0).to(tl.float32) * scale + (number >> 30)
    if add is not None:
        mixed += tl.load(add + at, mask=at < rows, other=0)
    tl.store(out + at, -mixed if NEGATE else mixed, mask=at < rows)


class Call:
    """One call of `mix_kernel`, and what it is to write."""

    def __init__(self, device="cuda", **changed):
        case = BASE | changed
        rows, offset, stride = (case.pop(name) for name in ("rows", "offset", "stride"))
        dtype, out_offset, add, number, scale = (case.pop(name) for name in ("dtype", "out_offset", "add", "number", "scale"))
        draw = lambda n: torch.randint(-8, 8, (n,), device=device)  # noqa: E731
        x = draw(offset + rows * stride).to(dtype)[offset:]
        self.out = torch.empty(out_offset + rows, device=device)[out_offset:]
        self.tensors = (x, draw(rows).float() if add else None, self.out)
        self.grid, self.numbers = (triton.cdiv(rows, case["BLOCK"]),), (rows, stride, number, scale)
        self.constants = case

    def want(self):
        (x, add, _), (_, stride, number, scale) = self.tensors, self.numbers
        mixed = x[::stride].float() * scale + (number >> 30) + (0 if add is None else add)
        return -mixed if self.constants["NEGATE"] else mixed

    def check(self, run):
        self.out.fill_(torch.nan)
        run(self)
        assert torch.equal(self.out, self.want())


def by_triton(call):
    mix_kernel[call.grid](*call.tensors, *call.numbers, **call.constants)


def by_launch(call):
    launch(mix_kernel, call.grid, call.tensors, call.numbers, **call.constants)


def by_one_for_each():
    """A `Launch` for each set of numbers and constants, as hosts keep them."""
    made = {}

    def run(call):
        key = str((call.grid, call.numbers, call.constants))
        made.setdefault(key, Launch(mix_kernel, call.grid, call.numbers, **call.constants))(*call.tensors)

    return run


def forbid_triton(monkeypatch):
    monkeypatch.setattr(JITFunction, "run", lambda *_, **__: pytest.fail("Triton was asked again"))


@pytest.mark.parametrize("form", ["launch", "Launch"])
def test_any_arguments_after_any_others(form, monkeypatch):
    calls = [Call(**changed) for changed in CHANGED]
    run = by_launch if form == "launch" else by_one_for_each()
    for call in calls:
        call.check(by_triton)
        call.check(run)
    forbid_triton(monkeypatch)
    for call in (*reversed(calls), *calls):
        call.check(run)
    others = [Call(**changed) for changed in CHANGED]  # other memory, of the same alignment
    for call in others:
        call.check(run)


def test_graph_replay_on_new_contents(monkeypatch):
    """Capture also proves the stream: it refuses launches on another."""
    calls = [Call(), Call(offset=1), Call(number=1 << 40, NEGATE=True)]
    for call in calls:
        call.check(by_launch)
    forbid_triton(monkeypatch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            by_launch(call)
    for _ in range(3):
        for call in calls:
            call.tensors[0].random_(-8, 8)
        graph.replay()
        for call in calls:
            assert torch.equal(call.out, call.want())
            call.out.fill_(torch.nan)


def test_threads_share_what_is_remembered():
    """Each with calls and a stream of its own; the first thing that each does on the GPU is a launch."""
    calls = [[Call(**changed) for changed in CHANGED] for _ in range(8)]
    for call in calls[0]:
        by_triton(call)  # compiled once: Triton's compiler is not asked by several threads
    streams = [torch.cuda.Stream() for _ in calls]
    for own in calls:
        for call in own:
            call.out.fill_(torch.nan)
    launcher._kept.clear()
    torch.cuda.synchronize()

    def work(own, stream):
        torch.cuda.set_stream(stream)  # this thread's
        for call in own * 5:
            by_launch(call)
        stream.synchronize()

    with ThreadPoolExecutor(len(calls)) as threads:
        list(threads.map(work, calls, streams))
    assert all(torch.equal(call.out, call.want()) for own in calls for call in own)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_devices_in_turns(monkeypatch):
    calls = {device: [Call(device, **changed) for changed in CHANGED[:8]] for device in (0, 1)}
    run = by_one_for_each()
    for device in calls:
        torch.cuda.synchronize(device)  # what they read was made on other streams
    for turn in range(3):
        for device, own in calls.items():
            with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
                for call in own:
                    call.check(run)
                    call.check(by_launch)
        if turn == 0:
            forbid_triton(monkeypatch)


SOURCE = """
import triton
import triton.language as tl


@triton.jit
def fill_kernel(out, number, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), number + {value})
"""


def test_modules_that_are_gone(tmp_path, monkeypatch):
    """Kernels of one name, the next at the address of the last, perhaps; a kernel that Triton itself let go of still runs."""
    monkeypatch.setattr(launcher, "KEPT", 2)
    out = torch.empty(32, device="cuda")
    for value in range(6):
        path = tmp_path / f"module_{value}.py"
        path.write_text(SOURCE.format(value=value))
        spec = importlib.util.spec_from_file_location("module", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        kernel = module.fill_kernel
        for _ in range(2):
            launch(kernel, (1,), (out,), (100,), BLOCK=32)
            assert torch.equal(out, torch.full_like(out, 100 + value))
            kernel.device_caches.clear()
            gc.collect()
            out.zero_()
        del kernel, module, spec
