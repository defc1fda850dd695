"""How a row of the table in ops.py becomes `torch.ops.tsa.<name>`: schema, fake, dispatch by device, no gradient.

Every operator is registered here and nowhere else, so that what all share is said once: arguments are checked before anything
runs; CPU tensors go to the plain-PyTorch reference; CUDA tensors go to the host function, under a guard that makes their GPU
the current one (Triton launches on the current device, whatever its operands say); and asking for a gradient is an error.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from tsa_compile.kernels.forward_only import refuse_gradients, refuse_gradients_and_count_versions

Tensor = torch.Tensor
Observer = Callable[[Tensor, int], None]
REMEMBERED = 4096  # descriptions of an operator's arguments; then it begins anew
_NUMBERS = frozenset((type(None), bool, int, float, str))
LIBRARY = torch.library.Library("tsa", "DEF")


class Operator(NamedTuple):
    """One row of the table. Its first argument is a tensor.

    Args:
        schema: as `torch.library` reads it: `name(Tensor q, ...) -> Tensor`.
        check: raises a ValueError that names the operator, the argument, its value and what is allowed. It reads shapes, strides,
            dtypes and devices, never data, and is asked once for the same.
            Not asked where sizes are symbols, as each comparison would guard a graph against other lengths: calls have numbers.
        fake: uninitialised results of the real shapes, dtypes and strides.
        reference: "module:function" below `tsa_compile.kernels`, in plain PyTorch: what runs on CPU tensors.
        host: "module:function" that launches the kernels: what runs on CUDA tensors. Both are imported at the first call.
        arguments: from the arguments of the schema to those of the four functions above; None: they take the schema's own.
        kept: what recorders are told of its calls, from the result and the schema's arguments: (how much is kept, integers `[B]`,
            of how much), or None where the operator does so itself (`tell`). None: it selects nothing.
    """

    schema: str
    check: Callable[..., None]
    fake: Callable[..., Any]
    reference: str
    host: str
    arguments: Callable[..., tuple[Any, ...]] | None = None
    kept: Callable[[Any, tuple[Any, ...], dict[str, Any]], tuple[Tensor, int] | None] | None = None

    @property
    def name(self) -> str:
        return self.schema.partition("(")[0]


def add(operator: Operator) -> None:
    """Define and register one operator."""
    LIBRARY.define(operator.schema)

    def taken(args: Any, kwargs: Any) -> tuple[Any, Any]:
        return (args, kwargs) if operator.arguments is None else (operator.arguments(*args, **kwargs), {})

    def fake(*flat: Any, **named: Any) -> Any:
        args, kwargs = taken(flat, named)
        if not any(isinstance(n, torch.SymInt) for x in (*flat, *named.values()) if isinstance(x, Tensor) for n in x.shape):
            operator.check(*args, **kwargs)
        return operator.fake(*args, **kwargs)

    right: set[Any] = set()  # descriptions of arguments that were checked

    def run(where: str) -> Callable[..., Any]:
        def call(*flat: Any, **named: Any) -> Any:
            args, kwargs = taken(flat, named)
            described = (*map(_describe, flat), *named, *map(_describe, named.values()))
            if described not in right:
                operator.check(*args, **kwargs)
                if len(right) >= REMEMBERED:
                    right.clear()
                right.add(described)
            result = resolve(where)(*args, **kwargs)
            kept = operator.kept
            if kept is not None:
                tell(lambda: kept(result, flat, named))
            return tuple(result) if isinstance(result, tuple) else result  # the dispatcher takes no NamedTuple

        return call

    register(operator.name, fake, run(operator.reference), run(operator.host))


def register(name: str, fake: Callable[..., Any], cpu: Callable[..., Any], cuda: Callable[..., Any]) -> None:
    """Register functions for operator `name`, whose schema is defined: `add` does both from one row."""
    op = getattr(torch.ops.tsa, name).default
    cuda = on_its_device(cuda)
    torch.library.register_fake(f"tsa::{name}", fake, lib=LIBRARY)
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, cuda, "CUDA")
    if op._schema.is_mutable:
        refuse_gradients_and_count_versions(LIBRARY, op)
    else:
        refuse_gradients(LIBRARY, op, {"CPU": cpu, "CUDA": cuda})


def _describe(x: Any) -> Any:
    """All that a check can see of an argument."""
    kind = x.__class__
    if kind in _NUMBERS:
        return x
    return tuple(x) if kind is list else (x.shape, x.stride(), x.dtype, x.device)


@functools.cache
def resolve(where: str) -> Callable[..., Any]:
    """The function at "module:function" below `tsa_compile.kernels`."""
    module, _, function = where.partition(":")
    return getattr(importlib.import_module(f"tsa_compile.kernels.{module}"), function)


def on_its_device(host: Callable[..., Any]) -> Callable[..., Any]:
    """`host`, called with the GPU of its first argument as the current one."""

    def call(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        if first.device.index == torch.cuda.current_device():
            return host(first, *args, **kwargs)
        with torch.cuda.device(first.device):
            return host(first, *args, **kwargs)

    return call


# ---- recorders

_observers: contextvars.ContextVar[tuple[Observer, ...]] = contextvars.ContextVar("tsa_observers", default=())


@contextlib.contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Inside, `observer(kept [B], of)` is called for each selection of this thread (or asyncio task), and of no other."""
    token = _observers.set((*_observers.get(), observer))
    try:
        yield
    finally:
        _observers.reset(token)


def tell(kept: Callable[[], tuple[Tensor, int] | None]) -> None:
    """Recorders, where there are any, are told what a selection keeps, unless it is None."""
    found = kept() if _observers.get() else None
    if found is not None:
        for observer in _observers.get():
            observer(*found)
