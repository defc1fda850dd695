"""Checks of the operators over a cache, which take a few query rows, K, V and a `KvView`. They read shapes and dtypes only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tsa_compile.kernels.checks import check_attention
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor
MAX_ROWS = 16  # query rows of a step
MAX_HEAD_DIM = 256
PAGE = 16  # rows of a page
MAX_SAMPLES = 4096  # of a query row, in `sampled_value_attention`
FORMS = ("prop", "flash")


def check_view(name: str, q: Tensor, k: Tensor, view: KvView) -> int:
    """The capacity: how many positions a row of the batch may have. Raises a ValueError that names operator `name`."""
    batch = q.shape[0]
    for label, x in (("start", view.start), ("lengths", view.lengths)):
        if x is not None and (x.dtype != torch.int32 or tuple(x.shape) != (batch,) or not _plain(x, q)):
            raise ValueError(f"{name}: {label} must be contiguous int32 [{batch}] on {q.device}, got {_told(x)}")
    if view.block < 1:
        raise ValueError(f"{name}: block must be at least 1, got {view.block}")
    if view.blocks is None:
        if k.shape[0] != batch:
            raise ValueError(f"{name}: q has {batch} rows of a batch and k {k.shape[0]}; without blocks they must agree")
        return k.shape[2]
    blocks = view.blocks
    if blocks.dtype != torch.int32 or blocks.dim() != 2 or blocks.shape[0] != batch or blocks.stride(1) != 1:
        raise ValueError(f"{name}: blocks must be int32 [{batch}, P], rows contiguous, got {_told(blocks)}")
    if k.shape[2] % view.block:
        raise ValueError(f"{name}: block must divide the {k.shape[2]} rows of k, got {view.block}")
    return blocks.shape[1] * view.block


def check_cache(name: str, q: Tensor, k: Tensor, v: Tensor, view: KvView, key_mask: Tensor | None) -> int:
    """As `check_view`, of all operands of an attention over a cache."""
    same_batch = q if view.blocks is None else q[:1].expand(k.shape[0], -1, -1, -1)  # k and v are a pool of blocks
    check_attention(name, same_batch, k, v, None, causal=False)
    if not 1 <= q.shape[2] <= MAX_ROWS:
        raise ValueError(f"{name}: q must have 1 to {MAX_ROWS} rows, got {q.shape[2]}")
    if v.shape[3] > MAX_HEAD_DIM:
        raise ValueError(f"{name}: the head dim of v must be at most {MAX_HEAD_DIM}, got {v.shape[3]}")
    if q.device.type == "cuda" and q.dtype == torch.float64:
        raise ValueError(f"{name}: float64 runs on CPU only")
    capacity = check_view(name, q, k, view)
    if key_mask is not None and (key_mask.dtype != torch.bool or tuple(key_mask.shape) != (q.shape[0], capacity)):
        raise ValueError(f"{name}: key_mask must be bool {(q.shape[0], capacity)}, got {_told(key_mask)}")
    return capacity


def check_masks(
    name: str, q: Tensor, capacity: int, mask: Tensor | None, sinks: Tensor | None, softcap: float, window: int, causal: bool
) -> None:
    """Raise a ValueError that names operator `name`, unless what may hide or weigh keys fits `q` and the capacity."""
    if mask is not None:
        fits = mask.dim() == 4 and all(n in (1, m) for n, m in zip(mask.shape[:3], q.shape[:3], strict=True))
        if not fits or mask.shape[3] != capacity or not (mask.dtype == torch.bool or mask.is_floating_point()):
            wanted = f"bool or floating point {(*q.shape[:3], capacity)}, the first three or 1"
            raise ValueError(f"{name}: mask must be {wanted}, got {_told(mask)}")
    if sinks is not None and (tuple(sinks.shape) != (q.shape[1],) or not sinks.is_floating_point() or not _plain(sinks, q)):
        raise ValueError(f"{name}: sinks must be one logit for each of {q.shape[1]} heads, got {_told(sinks)}")
    if softcap < 0 or window < 0:
        raise ValueError(f"{name}: softcap and window must be at least 0 (off), got {softcap} and {window}")
    if window and not causal:
        raise ValueError(f"{name}: a window needs causal=True, got window {window} with causal=False")


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None, block: int, start: Tensor | None, lengths: Tensor | None,
    key_mask: Tensor | None, scale: float, mask: Tensor | None = None, sinks: Tensor | None = None,
    softcap: float = 0.0, window: int = 0, causal: bool = True, scores: bool = False,
) -> None:  # fmt: skip
    name = "tsa::decode_attention"
    capacity = check_cache(name, q, k, v, KvView(blocks, block, start, lengths), key_mask)
    check_masks(name, q, capacity, mask, sinks, softcap, window, causal)


def resident_attention(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, lengths: Tensor | None, key_mask: Tensor | None, scale: float
) -> None:
    check_cache("tsa::resident_attention", q, k, v, KvView(None, 1, start, lengths), key_mask)


def page_attention(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, blocks: Tensor | None, block: int, start: Tensor | None,
    lengths: Tensor | None, key_mask: Tensor | None, scale: float, mask: Tensor | None = None,
    sinks: Tensor | None = None, softcap: float = 0.0, causal: bool = True, windows: Sequence[int] | None = None,
    first_keys: int = 0,
) -> None:  # fmt: skip
    name = "tsa::page_attention"
    if windows is not None and (len(windows) != q.shape[1] or min(windows) < 0 or first_keys < 0):
        raise ValueError(f"{name}: windows must be {q.shape[1]} numbers from 0 on, one a head, and first_keys from 0 on, got "
                         f"{list(windows)} and {first_keys}")  # fmt: skip
    capacity = check_cache(name, q, k, v, KvView(blocks, block, start, lengths), key_mask)
    check_masks(name, q, capacity, mask, sinks, softcap, 0, causal)
    _check_lists(name, indices, counts, q, ((q.shape[0], k.shape[1]),))


def listed_attention(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, since: Tensor, start: Tensor | None,
    lengths: Tensor | None, key_mask: Tensor | None, scale: float, mask: Tensor | None = None, sinks: Tensor | None = None,
) -> None:  # fmt: skip
    name, (batch, kv_heads) = "tsa::listed_attention", k.shape[:2]
    capacity = check_cache(name, q, k, v, KvView(None, 1, start, lengths), key_mask)
    check_masks(name, q, capacity, mask, sinks, 0.0, 0, causal=True)
    if q.shape[2] != 1:
        raise ValueError(f"{name}: q must have 1 row, got {q.shape[2]}")
    if since.dtype != torch.int32 or tuple(since.shape) != (batch,) or not _plain(since, q):
        raise ValueError(f"{name}: since must be contiguous int32 [{batch}], got {_told(since)}")
    _check_lists(name, indices, counts, q, ((batch, kv_heads), (batch, 1)))


def sampled_value_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None, block: int, start: Tensor | None, lengths: Tensor | None,
    key_mask: Tensor | None, scale: float, seed: Tensor, samples: int, form: str, mask: Tensor | None = None,
    sinks: Tensor | None = None, softcap: float = 0.0,
) -> None:  # fmt: skip
    name = "tsa::sampled_value_attention"
    capacity = check_cache(name, q, k, v, KvView(blocks, block, start, lengths), key_mask)
    check_masks(name, q, capacity, mask, sinks, softcap, 0, causal=True)
    if q.shape[2] != 1:
        raise ValueError(f"{name}: q must have 1 row, got {q.shape[2]}")
    check_seed(name, q, seed)
    if not 1 <= samples <= MAX_SAMPLES:
        raise ValueError(f"{name}: samples must be 1 to {MAX_SAMPLES}, got {samples}")
    if form not in FORMS:
        raise ValueError(f"{name}: form must be one of {FORMS}, got {form!r}")


def check_seed(name: str, q: Tensor, seed: Tensor) -> None:
    """Raise a ValueError that names operator `name`, unless it is one seed, or one for each row of the batch."""
    if seed.dtype != torch.int64 or tuple(seed.shape) not in ((1,), (q.shape[0],)) or seed.device != q.device:
        raise ValueError(f"{name}: seed must be int64 [1] or [{q.shape[0]}] on {q.device}, got {_told(seed)}")


def attach_state(state: Tensor, k: Tensor) -> None:
    if k.dim() != 4 or k.shape[0] != state.shape[0]:
        shapes = f"{tuple(state.shape)} and {tuple(k.shape)}"
        raise ValueError(f"tsa::attach_state: state must have the batch rows of k [B, Hk, L, D], got {shapes}")


def attach_rows(mark: Tensor, lengths: Tensor, mask: Tensor, start: Tensor | None, k: Tensor) -> None:
    wanted = (k.shape[0], 1, k.shape[2])
    if k.dim() != 4 or mask.dim() != 4 or mask.dtype != torch.bool or (mask.shape[0], mask.shape[1], mask.shape[3]) != wanted:
        raise ValueError(f"tsa::attach_rows: mask must be bool [B, 1, rows, L] of k [B, Hk, L, D], got {_told(mask)}")
    for name, x in (("lengths", lengths), ("start", start)):
        if x is not None and (x.dtype != torch.int32 or tuple(x.shape) != (k.shape[0],)):
            raise ValueError(f"tsa::attach_rows: {name} must be int32 [{k.shape[0]}], got {_told(x)}")


def _check_lists(name: str, indices: Tensor, counts: Tensor, q: Tensor, shapes: Sequence[tuple[int, int]]) -> None:
    """`shapes`: those that the lists' first two dimensions may have."""
    allowed = " or ".join(map(str, shapes))
    if indices.dtype != torch.int32 or indices.dim() != 3 or tuple(indices.shape[:2]) not in shapes or indices.stride(2) != 1:
        raise ValueError(f"{name}: indices must be int32 {allowed} lists, rows contiguous, got {_told(indices)}")
    if counts.dtype != torch.int32 or counts.shape != indices.shape[:2] or not _plain(counts, q):
        raise ValueError(f"{name}: counts must be contiguous int32 {tuple(indices.shape[:2])}, got {_told(counts)}")


def _plain(x: Tensor, q: Tensor) -> bool:
    return x.is_contiguous() and x.device == q.device


def _told(x: Any) -> str:
    return f"{x.dtype} {tuple(x.shape)}, strides {x.stride()}, on {x.device}"
