"""A remembered launch runs the kernel that Triton would choose, with the same arguments. Compiler and driver are stand-ins."""

import gc
import itertools
import types
import weakref

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from tsa_compile.kernels.common import launcher
from tsa_compile.kernels.common.launcher import Launch, Pieces, launch


def kernel(x, y, out, n, stride, scale, BLOCK, FLAG=False):
    """Arguments of every kind; it never runs."""


kernel.__annotations__ = {"BLOCK": "tl.constexpr", "FLAG": "tl.constexpr"}


class Gpu:
    """Triton's driver and compiler. `launched`: (specialisation, grid, stream, arguments) each time; `compiled`: the first."""

    def __init__(self):
        self.launched, self.compiled, self.device = [], [], 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 100 + max(0, device)

    def compile(self, source, target, options):
        shown = str((source.signature, source.constants, source.attrs, sorted(options.items())))
        self.compiled.append(shown)

        def run(x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
            self.launched.append((function, (x, y, z), stream, args))
            for hook in (enter, leave):
                if hook is not None:
                    hook(launch_metadata)

        return Compiled(run=run, function=shown, packed_metadata=None, launch_metadata=lambda *_: "told")


class Compiled(types.SimpleNamespace):
    """What the compiler makes; weak references to it are possible."""


class OnGpu(torch.Tensor):
    """Says that it lies on a GPU."""

    where = 0

    def get_device(self):
        return self.where


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    monkeypatch.setattr("triton.compiler.compile", gpu.compile)
    monkeypatch.setattr(launcher, "CPU", -2)  # memory of the CPU is as good as any
    driver.set_active(gpu)
    yield gpu
    driver.set_active(None)  # the default
    launcher._kept.clear()


@pytest.fixture
def jit():
    return JITFunction(kernel, do_not_specialize=["n"])


DATA = torch.zeros(4096, dtype=torch.uint8)
HALF, WIDE = DATA.view(torch.float16), DATA.view(torch.float32)
ALIGNED = -DATA.data_ptr() % 16 // 4


def cases():
    """Arguments that Triton tells apart, and such that it does not."""
    tensors = [WIDE[ALIGNED:], WIDE[ALIGNED + 1 :], WIDE[ALIGNED + 4 :], HALF[2 * ALIGNED :], WIDE.int()[1:]]
    numbers = itertools.product((7, 16, 1, 1 << 33), (1, 16, 17, 32, 1 << 40), (0.5, 1.0, 1))
    for x, y, (n, stride, scale) in itertools.product(tensors[:4], (None, tensors[4], tensors[0]), numbers):
        yield (x, y, WIDE), (n, stride, scale)


def is_same(own, argument):
    """Are the arguments of two launches alike? An address stands for its tensor."""
    if isinstance(argument, torch.Tensor):
        return own is argument or own == argument.data_ptr()
    return own is argument or (type(own) is type(argument) and own == argument)


@pytest.mark.parametrize("form", ["a Launch for each", "launch"])
def test_the_same_kernels_as_triton(gpu, jit, form):
    """In one go by Triton alone, and in two by launches: each time the same kernels with the same arguments."""
    calls = [(t, n, {"BLOCK": block}) for (t, n), block in zip(cases(), itertools.cycle((16, 32)), strict=False)]
    for tensors, numbers, constants in calls:
        jit[(3, 2)](*tensors, *numbers, **constants)
    expected, kernels = gpu.launched[:], len(gpu.compiled)
    assert 40 < kernels < len(calls)
    made = {}
    for _ in range(2):
        gpu.launched.clear()
        for tensors, numbers, constants in calls:
            if form == "launch":
                launch(jit, (3, 2), tensors, numbers, **constants)
            else:
                key = str((numbers, constants))
                made.setdefault(key, Launch(jit, (3, 2), numbers, **constants))(*tensors)
        for (function, grid, stream, args), (own, own_grid, own_stream, own_args) in zip(expected, gpu.launched, strict=True):
            assert (own, own_grid, own_stream) == (function, grid, stream)
            assert len(own_args) == len(args)
            assert all(is_same(a, b) for a, b in zip(own_args, args, strict=True))
    assert len(gpu.compiled) == kernels


def test_a_remembered_launch_is_not_triton_s(gpu, jit, monkeypatch):
    once = Launch(jit, (5,), (7, 16, 0.5), BLOCK=16, num_warps=8)
    once(WIDE, None, WIDE)
    monkeypatch.setattr(JITFunction, "run", lambda *_, **__: pytest.fail("Triton was asked again"))
    once(WIDE, None, WIDE)
    (*first, args), (*second, own_args) = gpu.launched
    assert first == second
    assert own_args == tuple(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in args)
    with pytest.raises(pytest.fail.Exception):
        once(WIDE[1:], None, WIDE)


def test_new_lengths_compile_nothing(gpu, jit):
    for n in (2, 3, 777, 4096, 100_000):
        launch(jit, (n,), (WIDE, None, WIDE), (n, 128, 0.5), BLOCK=16)
    assert len(gpu.compiled) == 1
    assert [grid for _, grid, *_ in gpu.launched] == [(n, 1, 1) for n in (2, 3, 777, 4096, 100_000)]


def test_kernels_that_come_and_go(gpu, monkeypatch):
    """Neither a new kernel at the address of one that is gone, nor a table that was emptied, leads to another kernel."""
    monkeypatch.setattr(launcher, "KEPT", 3)
    for _ in range(5):
        launch(JITFunction(kernel), (1,), (WIDE, None, WIDE), (7, 16, 0.5), BLOCK=16)
        gc.collect()
    assert len(gpu.compiled) == 5


def test_what_runs_is_held(gpu, jit):
    """Triton may let go of a kernel, and newer ones then unload its module."""
    once = Launch(jit, (1,), (7, 16, 0.5), BLOCK=16)
    once(WIDE, None, WIDE)
    (found,) = once._found.values()
    held = weakref.ref(found[-1])
    del found
    jit.device_caches.clear()
    gc.collect()
    assert held() is not None
    once(WIDE, None, WIDE)
    assert len(gpu.compiled) == 1


def test_options_are_part_of_the_kernel(gpu, jit):
    for warps in (4, 8, 4):
        launch(jit, (1,), (WIDE, None, WIDE), (7, 16, 0.5), BLOCK=16, num_warps=warps)
    first, second, third = (function for function, *_ in gpu.launched)
    assert first == third != second


def test_each_device_has_kernels_and_streams_of_its_own(gpu, jit):
    x = WIDE.as_subclass(OnGpu)
    once = Launch(jit, (1,), (7, 16, 0.5), BLOCK=16)
    for device in (0, 1, 0, 1):
        gpu.device = OnGpu.where = device
        once(x, None, x)
    OnGpu.where = 0
    assert [stream for _, _, stream, _ in gpu.launched] == [100, 101, 100, 101]
    assert len(gpu.compiled) == 2


def test_tensors_elsewhere_are_left_to_triton(gpu, jit):
    """It knows what a GPU can read: pinned memory of the host, not other memory of the host."""
    gpu.device, x = 0, WIDE.as_subclass(OnGpu)
    once = Launch(jit, (1,), (7, 16, 0.5), BLOCK=16)
    for _ in range(2):
        once(x, None, WIDE)
    assert [gpu.launched[1][-1][i] for i in (0, 2)] == [WIDE.data_ptr(), WIDE]


def test_hooks_of_a_profiler_hear_of_every_launch(gpu, jit):
    heard = []
    once = Launch(jit, (1,), (7, 16, 0.5), BLOCK=16)
    once(WIDE, None, WIDE)
    once(WIDE, None, WIDE)
    knobs.runtime.launch_enter_hook.add(heard.append)
    try:
        once(WIDE, None, WIDE)
    finally:
        knobs.runtime.launch_enter_hook.remove(heard.append)
    once(WIDE, None, WIDE)
    assert heard == ["told"]
    assert len(gpu.launched) == 4


def test_cpu_tensors_go_triton_s_way(gpu, jit, monkeypatch):
    """Which then says that their memory is not the GPU's."""
    monkeypatch.setattr(launcher, "CPU", -1)
    once = Launch(jit, (1,), (7, 16, 0.5), BLOCK=16)
    once(WIDE, None, WIDE)
    assert not once._found


def test_descriptors(gpu, jit):
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout, x = gl.NVMMASharedLayout(128, 16, 2), torch.zeros(64, 128, dtype=torch.float16)
    pieces = Pieces(torch.float16, [64, 128], [128, 1], [64, 64], layout)
    made, real = pieces.of(x), TensorDescriptor(x, [64, 128], [128, 1], [64, 64], layout)
    assert isinstance(made, TensorDescriptor)
    assert all(getattr(made, name) is getattr(real, name) or getattr(made, name) == getattr(real, name) for name in vars(real))
    once = Launch(jit, (1,), (7, 16, 0.5), BLOCK=16)
    for _ in range(2):
        once(pieces.of(x), None, WIDE)
    once(Pieces(torch.float16, [64, 128], [128, 1], [32, 64], layout).of(x), None, WIDE)
    assert len(gpu.compiled) == 2
    with pytest.raises(AssertionError, match="16-byte aligned"):
        Pieces(torch.float16, [64, 128], [129, 1], [64, 64], layout)
