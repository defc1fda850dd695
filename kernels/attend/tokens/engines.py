"""The dense engines behind `packed` where this project's own kernel is not, and the choice that `auto` makes.

An inner engine runs causal attention over packed rows whose number only the device knows: the tensors have the capacity,
`counts` says how many rows are used, and nothing synchronises.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from tsa_compile.kernels.attend.tokens import hopper
from tsa_compile.kernels.common.tiles import capability_of
from tsa_compile.kernels.common.user_cache import user_cache

Tensor = torch.Tensor
SHIPPED = Path(__file__).with_name("engines.json")
#: q [B, H, C, D], k [B, G, C, D], v [B, G, C, Dv], counts [B], scale, need_lse
#: -> out [B, H, C, Dv] and, if asked for, the natural log-sum-exp [B, H, C]; rows beyond the count are undefined
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, float, bool], "tuple[Tensor, Tensor | None]"]


class InnerEngine(NamedTuple):
    name: str
    missing: Callable[[Tensor, Tensor], str | None]  # (q, v) -> why it cannot run, or None
    attend: Attend
    chunks: bool = False  # does it run `Lq < Lk`? Rows of kept tokens without a query are zero then


def flash4_missing(q: Tensor, v: Tensor) -> str | None:
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"FlashAttention-4 takes float16 and bfloat16, not {q.dtype}"
    major = torch.cuda.get_device_capability(q.device)[0] if q.device.type == "cuda" else 0
    if major not in (9, 10):
        return "FlashAttention-4 needs a GPU of compute capability 9.x or 10.x"
    widest = 256 if major == 9 else 128
    if max(q.shape[-1], v.shape[-1]) > widest or q.shape[-1] % 8 or v.shape[-1] % 8:
        return f"FlashAttention-4 takes head dims up to {widest}, multiples of 8, not {q.shape[-1]} and {v.shape[-1]}"
    try:
        import flash_attn.cute  # noqa: F401
    except ImportError:
        return "the package flash-attn-4 is not installed"
    return None


def flash4_attend(q: Tensor, k: Tensor, v: Tensor, counts: Tensor, scale: float, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    """FlashAttention-4 reads the lengths on the device (`seqused`); compiled once per head dim and dtype."""
    from flash_attn.cute import flash_attn_varlen_func

    result = flash_attn_varlen_func(
        *(x.transpose(1, 2) for x in (q, k, v)),
        seqused_q=counts,
        seqused_k=counts,
        softmax_scale=scale,
        causal=True,
        return_lse=need_lse,
    )
    out, lse = result if isinstance(result, tuple) else (result, None)
    return out.transpose(1, 2), lse


#: fastest first
INNER = (InnerEngine("flash4", flash4_missing, flash4_attend),)


def find_inner(q: Tensor, v: Tensor) -> InnerEngine:
    """The fastest inner engine that can run q [B, H, L, D] and v [B, Hk, L, Dv].

    Raises:
        RuntimeError: none can; the message says why for each.
    """
    reasons = []
    for engine in INNER:
        reason = engine.missing(q, v)
        if reason is None:
            return engine
        reasons.append(reason)
    raise RuntimeError(f"engine 'packed' cannot run: {'; '.join(reasons)}; use 'fused'")


def choose(q: Tensor, k: Tensor, v: Tensor) -> str:
    """The engine that `auto` takes for q [B, H, Lq, D], k [B, Hk, Lk, D], v [B, Hk, Lk, Dv]: `packed` from the length on from
    which it was measured to be faster on this kind of GPU (`tsa-compile tune`), if it can run."""
    start = packed_from(q.device, max(q.shape[-1], v.shape[-1]))
    if start is None or k.shape[2] < start or q.shape[2] != k.shape[2]:
        return "fused"
    return "packed" if can_pack(q, k, v) else "fused"


def can_pack(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether engine `packed` runs q [B, H, L, D], k [B, Hk, L, D], v [B, Hk, L, Dv]."""
    return hopper.takes(q, k, v) or any(engine.missing(q, v) is None for engine in INNER)


def packed_from(device: torch.device, head_dim: int) -> int | None:
    """Tokens from which `packed` is faster, for this compute capability and head dim; None: never, or not measured."""
    table = measured_table()
    return table.get("{}.{}".format(*capability_of(device)), {}).get(str(head_dim))


@functools.cache
def measured_table() -> dict[str, dict[str, int | None]]:
    """Compute capability -> head dim -> tokens: what the package ships, and over it what `tsa-compile tune` measured here."""
    table: dict[str, dict[str, int | None]] = {}
    for path in (SHIPPED, tuned_file()):
        if path.is_file():
            for capability, entries in json.loads(path.read_text()).items():
                table.setdefault(capability, {}).update(entries)
    return table


def tuned_file() -> Path:
    """Where `tsa-compile tune` writes: TSA_TUNED, or engines.json in the user's cache folder."""
    return Path(os.environ.get("TSA_TUNED", user_cache() / "engines.json"))
