"""What operators do at the dispatcher's autograd keys: they have no gradient. Imports torch alone.

An operator without an argument that it writes runs at these keys, where the dispatcher comes first, unless something below them,
such as fake tensors or a trace, is to see the call: `torch.library.register_autograd` would dispatch a second time, by 10
microseconds of Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

BACKENDS = {"CPU": torch._C.DispatchKey.CPU, "CUDA": torch._C.DispatchKey.CUDA}


def refuse_gradients(library: Any, op: Any, backends: dict[str, Callable[..., Any]]) -> None:
    """Register what `op`, that writes no argument, does at the autograd keys.

    Args:
        library: the `torch.library.Library` that defines it.
        op: the overload (`torch.ops.<namespace>.<name>.default`).
        backends: "CPU" and "CUDA" -> the function that runs it there.
    """
    library.impl(op._opname, _below(op, None, lambda: None), "Autograd", with_keyset=True)
    for name, run in backends.items():
        library.impl(op._opname, _below(op, BACKENDS[name], run), f"Autograd{name}", with_keyset=True)


def _below(op: Any, backend: Any, run: Callable[..., Any]) -> Callable[..., Any]:
    plain: set[int] = set()  # key sets in which nothing stands between autograd and `backend`

    def autograd(keys: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and any(getattr(a, "requires_grad", False) for a in args):
            return _ForwardOnly.apply(op, keys, kwargs, *args)
        with torch._C._AutoDispatchBelowAutograd():
            if keys.raw_repr() in plain:
                return run(*args, **kwargs)
            below = keys & torch._C._after_autograd_keyset
            if below.highestPriorityTypeId() == backend:
                plain.add(keys.raw_repr())
            return op.redispatch(below, *args, **kwargs)

    return autograd


class _ForwardOnly(torch.autograd.Function):
    """Results that raise an error when a gradient is asked of them."""

    @staticmethod
    def forward(ctx: Any, op: Any, keys: Any, kwargs: Any, *args: Any) -> Any:
        ctx.op = op
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *args, **kwargs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise refusal(ctx.op)


def refusal(op: Any) -> NotImplementedError:
    """The error for a gradient of `op`."""
    return NotImplementedError(
        f"{op._schema.name} is forward only: it has no gradient. Train the dense model (tsa_compile.restore), "
        "or run under torch.no_grad()."
    )


def refuse_gradients_and_count_versions(library: Any, op: Any) -> None:
    """Register what torch does not do by itself for `op`, that writes its arguments: refuse gradients at once, count versions."""
    written = [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]

    def autograd(keys: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and any(getattr(a, "requires_grad", False) for a in args):
            raise refusal(op)
        return op.redispatch(keys & torch._C._after_autograd_keyset, *args, **kwargs)

    def count_versions(keys: Any, *args: Any, **kwargs: Any) -> Any:
        for i in written:
            torch.autograd.graph.increment_version(args[i])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args, **kwargs)

    library.impl(op._opname, autograd, "Autograd", with_keyset=True)
    library.impl(op._opname, count_versions, "ADInplaceOrView", with_keyset=True)
