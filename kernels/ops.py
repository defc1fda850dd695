"""The operators of token-sparse attention, `torch.ops.tsa.*`: schemas, fakes, dispatch. docs/operators.md is the contract.

Imports no Triton: CPU tensors run the plain-PyTorch references, CUDA tensors the host functions, imported at the first call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tsa_compile.kernels.attend.tokens.reference import sparse_attention_reference
from tsa_compile.kernels.checks import check_attention, check_selection, check_selection_arguments
from tsa_compile.kernels.select.tokens.reference import select_tokens_reference

Tensor = torch.Tensor
Selected = tuple[Tensor, Tensor, Tensor]

LIBRARY = torch.library.Library("tsa", "DEF")
_SELECTION = "float coverage, int window, int pool, int min_tokens"
LIBRARY.define(
    f"select_tokens(Tensor q, Tensor k, Tensor? key_mask, float scale, {_SELECTION}, int heavy, *,"
    " str share='head') -> (Tensor indices, Tensor counts, Tensor heavy_indices)"
)
LIBRARY.define(
    "sparse_attention(Tensor q, Tensor k, Tensor v, Tensor indices, Tensor counts, Tensor heavy_indices,"
    " Tensor? key_mask, float scale, int strip_window, int strip_sinks, int dense_below, str engine) -> Tensor"
)
LIBRARY.define(
    f"token_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask, float scale, {_SELECTION},"
    " int strip_window, int strip_sinks, int heavy, str engine) -> Tensor"
)


def empty_result(q: Tensor, v: Tensor) -> Tensor:
    """An uninitialised result `[B, H, Lq, Dv]`, stored as `[B, Lq, H, Dv]`."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


# ---- select_tokens


def _check_select(q: Tensor, k: Tensor, key_mask: Tensor | None, *numbers: Any, share: str) -> None:
    check_attention("tsa::select_tokens", q, k, None, key_mask)
    check_selection_arguments("tsa::select_tokens", *numbers[1:], share)


def _select_fake(q: Tensor, k: Tensor, key_mask: Tensor | None, *numbers: Any, share: str = "head") -> Selected:
    _check_select(q, k, key_mask, *numbers, share=share)
    batch, lists, k_len, heavy = q.shape[0], (q if share == "head" else k).shape[1], k.shape[2], numbers[-1]
    new = lambda *shape: q.new_empty(shape, dtype=torch.int32)  # noqa: E731
    return new(batch, lists, k_len), new(batch), new(batch, lists, heavy)


def _select_cpu(q: Tensor, k: Tensor, key_mask: Tensor | None, *numbers: Any, share: str = "head") -> Selected:
    _check_select(q, k, key_mask, *numbers, share=share)
    return _observed(select_tokens_reference(q, k, key_mask, *numbers, share), k)


def _select_cuda(q: Tensor, k: Tensor, key_mask: Tensor | None, *numbers: Any, share: str = "head") -> Selected:
    from tsa_compile.kernels.select.tokens.host import select_tokens

    _check_select(q, k, key_mask, *numbers, share=share)
    return _observed(select_tokens(q, k, key_mask, *numbers, share), k)


OBSERVERS: list[Callable[[Tensor, int], None]] = []  # each is called with counts [B] and k_len, on every selection


def _observed(selected: Selected, k: Tensor) -> Selected:
    for observer in OBSERVERS:
        observer(selected[1], k.shape[2])
    return selected


# ---- sparse_attention


def _check_sparse(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, heavy: Tensor, mask: Tensor | None, engine: str
) -> None:
    check_attention("tsa::sparse_attention", q, k, v, mask)
    check_selection("tsa::sparse_attention", q, k, indices, counts, heavy)
    if engine not in ("auto", "fused", "packed", "reference"):
        raise ValueError(f"tsa::sparse_attention: unknown engine {engine!r}; expected auto, fused, packed or reference")


def _sparse_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    _check_sparse(q, k, v, *rest[:4], rest[-1])
    return empty_result(q, v)


def _sparse_cpu(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    _check_sparse(q, k, v, *rest[:4], rest[-1])
    if rest[-1] in ("fused", "packed"):
        raise RuntimeError(f"tsa::sparse_attention: engine {rest[-1]!r} needs CUDA tensors; on CPU use auto or reference")
    return sparse_attention_reference(q, k, v, *rest)


def _sparse_cuda(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    from tsa_compile.kernels.attend.tokens.host import sparse_attention

    _check_sparse(q, k, v, *rest[:4], rest[-1])
    return sparse_attention(q, k, v, *rest)


# ---- token_sparse_attention: select_tokens and sparse_attention in one


def _token_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    scale: float,
    coverage: float,
    window: int,
    pool: int,
    min_tokens: int,
    strip_window: int,
    strip_sinks: int,
    heavy: int,
    engine: str,
) -> Tensor:
    selection = torch.ops.tsa.select_tokens(q, k, key_mask, scale, coverage, window, pool, min_tokens, heavy)
    return torch.ops.tsa.sparse_attention(
        q, k, v, *selection, key_mask, scale, strip_window, strip_sinks, min_tokens + window, engine
    )


def _token_sparse_fake(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, *rest: Any) -> Tensor:
    check_attention("tsa::token_sparse_attention", q, k, v, key_mask)
    return empty_result(q, v)


# ---- registration


def _forward_only(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"{name} is forward only: it has no gradient. Train the dense model (tsa_compile.restore), "
            "or run under torch.no_grad()."
        )

    return backward


def register(name: str, fake: Callable[..., Any], cpu: Callable[..., Any], cuda: Callable[..., Any]) -> None:
    torch.library.register_fake(f"tsa::{name}", fake, lib=LIBRARY)
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_autograd(f"tsa::{name}", _forward_only(f"tsa::{name}"), lib=LIBRARY)


register("select_tokens", _select_fake, _select_cpu, _select_cuda)
register("sparse_attention", _sparse_fake, _sparse_cpu, _sparse_cuda)
register("token_sparse_attention", _token_sparse_fake, _token_sparse, _token_sparse)


def source_tag() -> str:
    """A hash of the files of operators: compile caches see an operator's schema, but neither its fake nor its gradient."""
    files = sorted(Path(__file__).parent.glob("*ops.py"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]
