"""Triton's launch with its choice of the compiled kernel remembered, which saves most of its time on the host.

Triton looks at every argument of every launch: at types, whether pointers and numbers are multiples of 16, which numbers are 1.
The same answers lead to the same compiled kernel, so here it is kept by what they depend on: numbers and constants as they are,
tensors by device, dtype and alignment. What is new goes Triton's own way, which compiles if it must; and so, each time, do
launches that a profiler wants to hear of, Triton's interpreter, CPU tensors, and ROCm, where the size of a storage counts, too.

A remembered launch hands over addresses in place of tensors: of a tensor, Triton's launcher asks the driver each time whether the
GPU can read it. It still does of tensors on another device than the first one's.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch

Tensor = torch.Tensor
KEPT = 4096  # launches that `launch` keeps
CPU = -1  # `Tensor.get_device()` of a CPU tensor


def launch(kernel: Any, grid: tuple[int, ...], tensors: tuple[Any, ...], numbers: tuple[Any, ...], **constants: Any) -> None:
    """`kernel[grid](*tensors, *numbers, **constants)`: the arguments of a `Launch`, for hosts that keep none."""
    key = (id(kernel), grid, numbers, *map(type, numbers), *constants.items())
    found = _kept.get(key)
    if found is None:
        if len(_kept) >= KEPT:
            _kept.clear()
        found = _kept[key] = Launch(kernel, grid, numbers, **constants)  # it holds the kernel, so that its id stays its own
    found(*tensors)


_kept: dict[Any, Launch] = {}


class Launch:
    """A launch of which everything is known but its tensors: hosts make one for each shape, and keep it.

    Args:
        kernel: a function decorated by `triton.jit` or `gluon.jit`. Its arguments are tensors first, then numbers.
        grid: programs, in up to three dimensions.
        numbers: its arguments behind the tensors, in its order.
        constants: its other arguments, and Triton's options (`num_warps`).
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], numbers: tuple[Any, ...], **constants: Any) -> None:
        self.grid = grid
        self._kernel, self._numbers, self._constants = kernel, numbers, constants
        self._programs = (*grid, 1, 1)[:3]
        self._found: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def __call__(self, *tensors: Any) -> None:
        """Launches on the current stream of the device of the first tensor, which must be the current device.

        Args:
            tensors: the first arguments of the kernel, among which may be descriptors (`Pieces`) and, but for the first, None.
        """
        device = tensors[0].get_device()
        key, given = [device], []
        for x in tensors:
            if x is None or not isinstance(x, Tensor):
                key.append(None if x is None else x.known)
                given.append(x)
            else:
                at = x.data_ptr()
                key.append((x.dtype, at & 15))
                given.append(at if x.get_device() == device else x)
        found = self._found.get(tuple(key))
        if found is None or _is_heard():
            return self._launch_by_triton(tuple(key), tensors)
        run, function, metadata, rest, _ = found
        stream = _driver().active.get_current_stream(device)
        run(*self._programs, stream, function, metadata, None, None, None, *given, *rest)

    def _launch_by_triton(self, key: tuple[Any, ...], tensors: tuple[Any, ...]) -> None:
        args = (*tensors, *self._numbers)
        compiled = self._kernel[self.grid](*args, **self._constants)
        if key[0] == CPU or compiled is None or torch.version.hip is not None:
            return
        rest = (self._constants.get(p.name, p.default) for p in self._kernel.params[len(args) :])
        # `compiled` itself, too: newer Tritons unload what nobody holds (triton-lang/triton, pull request 9444)
        self._found[key] = (compiled.run, compiled.function, compiled.packed_metadata, (*self._numbers, *rest), compiled)


class Pieces:
    """Descriptors of tensors of one shape, by which the tensor memory accelerator reads pieces of them; zeros outside.

    Triton's constructor checks what all of them share; it takes longer than the rest of a launch.

    Args:
        dtype, shape, strides: of the tensors, in elements.
        piece: its shape.
        layout: of a piece in shared memory.
    """

    def __init__(self, dtype: torch.dtype, shape: list[int], strides: list[int], piece: list[int], layout: Any) -> None:
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        somewhere = types.SimpleNamespace(dtype=dtype, data_ptr=lambda: 0)
        self._class = TensorDescriptor
        self._fields = vars(TensorDescriptor(somewhere, shape, strides, piece, layout))
        self._fields["known"] = (dtype, tuple(piece), str(layout))

    def of(self, x: Tensor) -> Any:
        """The descriptor of `x`, whose address is a multiple of 16."""
        made = object.__new__(self._class)
        vars(made).update(self._fields)
        made.base, made.get_device = x, x.get_device
        return made


def _is_heard() -> bool:
    """Does anyone, a profiler, want to be told of launches?"""
    hooks = _runtime()
    enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
    return bool(getattr(enter, "calls", enter)) or bool(getattr(leave, "calls", leave))


@functools.cache
def _runtime() -> Any:
    from triton import knobs

    return knobs.runtime


@functools.cache
def _driver() -> Any:
    from triton.runtime import driver

    return driver
