"""Hosts keep launches for a shape: no call runs with those of a call whose strides, dtypes, numbers or padding are others."""

import itertools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("triton")

from tsa_compile.kernels import compose, compose_blocks
from tsa_compile.kernels.attend.tokens.host import sparse_attention
from tsa_compile.kernels.common import launcher
from tsa_compile.kernels.common.mask_range import mask_range
from tsa_compile.kernels.common.ranks import view_of_mask
from tsa_compile.kernels.types import IDENTITY, KvView, Operands, Strip, TokenRule

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTH, DIM = (300, 64) if DEVICE == "cuda" else (72, 16)  # 64: Hopper's own kernels, where the inputs allow
KEPT = {"_launch", "_launches", "_plan", "_strip", "_invert"}
BASE = {
    "dtype": torch.float16, "rows_apart": False, "wide_k": False, "offset": 0, "padded": False, "heads": 4, "scale": 0.25,
    "coverage": 0.3, "window": 8, "sinks": 2,
}  # fmt: skip
# of one shape but for the heads, and each other launches
CHANGED = (
    {}, {"dtype": torch.float32}, {"rows_apart": True}, {"wide_k": True}, {"offset": 1}, {"padded": True}, {"heads": 2},
    {"scale": 0.5}, {"coverage": 0.6}, {"window": 5, "sinks": 0},
)  # fmt: skip


def inputs(seed, dtype, rows_apart, wide_k, offset, padded, heads, **_):
    g = torch.Generator().manual_seed(seed)

    def draw(number):
        x = torch.empty(number * LENGTH * DIM + offset, dtype=dtype, device=DEVICE)[offset:].view(1, number, LENGTH, DIM)
        return x.copy_(torch.randn(x.shape, generator=g))

    q, k, v = (draw(n) for n in (heads, 2, 2))
    q = q.transpose(1, 2).contiguous().transpose(1, 2) if rows_apart else q
    k = torch.stack([k, v], 4).flatten(3)[..., ::2] if wide_k else k
    mask = (torch.arange(LENGTH)[None] >= 5).to(DEVICE) if padded else None
    return q, k, v, mask


def results(tensors, scale, coverage, window, sinks, **_):
    """What token selection with its attention and block-sparse attention make of it."""
    q, k, v, mask = tensors
    x = Operands(q, k, v, view=view_of_mask(mask))
    kept = compose.select_tokens(x, scale, TokenRule(coverage, window, 3, 8, 6))
    out = sparse_attention(x, kept, scale, Strip(window, sinks), 0, "fused")[0]
    bounds = () if mask is None else mask_range(mask)
    blocks = Operands(q, k, v, mask, KvView(None, 1, *bounds) if bounds else IDENTITY)
    sparse = compose_blocks.block_sparse_attention(blocks, None, scale, [coverage], 128, window, sinks, 16, "head", True)
    return *kept, out, sparse, *bounds


def forget():
    launcher._kept.clear()
    for name, module in list(sys.modules.items()):
        for attribute in KEPT if name.startswith("tsa_compile.kernels") else ():
            getattr(getattr(module, attribute, None), "cache_clear", int)()


def check(got, want):
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=0, atol=0)


class Launched(threading.local):
    """What this thread launched: kernel, grid, numbers, constants, and its tensors but for their contents."""

    def __init__(self):
        self.found = []

    def of(self, case):
        """Of the host functions, on tensors of this thread's own."""
        self.found.clear()
        results(inputs(0, **case), **case)
        return self.found[:]


@pytest.fixture
def launched(monkeypatch):
    made = Launched()

    def note(launch, *tensors):
        seen = [x if x is None else (x.dtype, x.shape, x.stride(), x.data_ptr() % 16) for x in tensors]
        made.found.append((launch._kernel, launch.grid, launch._numbers, launch._constants, seen))

    monkeypatch.setattr(launcher.Launch, "__call__", note)
    forget()
    yield made
    forget()


def test_launches_are_those_of_a_first_call(launched):
    """In any order, and with 8 threads at once that find nothing kept."""
    cases, first = [BASE | changed for changed in CHANGED], []
    for case in cases:
        forget()
        first.append(launched.of(case))
    assert all(a != b for a, b in itertools.combinations(first, 2))
    for _ in range(2):
        assert [launched.of(case) for case in cases[::-1]] == first[::-1]
    forget()
    with ThreadPoolExecutor(8) as threads:
        for found in threads.map(lambda turn: [launched.of(case) for case in cases[turn:] + cases[:turn]], range(8)):
            turn = first.index(found[0])
            assert found == first[turn:] + first[:turn]


@pytest.fixture(scope="module")
def cases():
    """(Inputs, what a call that finds nothing kept makes of them, numbers)."""
    made = []
    for i, changed in enumerate(CHANGED):
        case = BASE | changed
        forget()
        tensors = inputs(i, **case)
        made.append((tensors, results(tensors, **case), case))
    forget()
    return made


@pytest.mark.gpu
def test_calls_in_any_order(cases):
    for tensors, want, case in (*cases, *reversed(cases)):
        check(results(tensors, **case), want)


@pytest.mark.gpu
def test_other_data_at_other_addresses(cases):
    """Of the shape and strides of a call before it."""
    case = cases[0][2]
    first, second = inputs(100, **case), inputs(101, **case)
    results(first, **case)
    got = results(second, **case)
    forget()
    check(got, results(second, **case))


@pytest.mark.gpu
def test_threads(cases):
    """8 at once, each in an order of its own and on a stream of its own; nothing is kept as they begin."""
    torch.cuda.synchronize()
    forget()

    def work(turn):
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [results(tensors, **case) for tensors, _, case in (*cases[turn:], *cases[:turn])]
            torch.cuda.current_stream().synchronize()
        return found

    with ThreadPoolExecutor(8) as threads:
        for turn, found in enumerate(threads.map(work, range(8))):
            for got, (_, want, _) in zip(found, (*cases[turn:], *cases[:turn]), strict=True):
                check(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_devices_in_turns(cases):
    for _ in range(2):
        for device in (0, 1):
            with torch.cuda.device(device):
                for tensors, want, case in cases:
                    there = tuple(None if x is None else x.to(device) for x in tensors)
                    check([x.cpu() for x in results(there, **case)], [x.cpu() for x in want])
