"""A transformed model is compiled already: to trace it from outside, which would give the dense model silently, is an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tsa_compile.call_rows import is_decode_step
from tsa_compile.dynamo import skips


class RefuseTraces:
    """A forward pre-hook of a transformed model: traces that go around its call, as of `torch.export` or of a larger model, are
    refused too. A copy or a pickle of the model has one that does nothing."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_dynamo_compiling() and not is_decode_step(kwargs):
            _refuse_unless_ours()

    def __deepcopy__(self, memo: Any) -> Callable[..., None]:
        return allow_traces

    def __reduce__(self) -> Any:
        return _allowing, ()


def allow_traces(module: nn.Module, args: Any, kwargs: Any) -> None:
    """The hook of a copy of a transformed model."""


def _allowing() -> Callable[..., None]:
    return allow_traces


@torch._dynamo.assume_constant_result  # both run while they are traced
def _refuse_unless_ours() -> None:
    if not skips.in_call:
        refuse_to_be_traced()


@torch._dynamo.assume_constant_result
def refuse_to_be_traced() -> None:
    raise RuntimeError(
        "torch.compile or torch.export of a module that was transformed by tsa_compile: it is compiled already. Use "
        'torch.compile(model, backend="tsa") instead of transform, tsa_compile.export for exports, or tsa_compile.restore(model).'
    )
