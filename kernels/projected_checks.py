"""Checks of the operators on projected keys, an index of each key of a cache. They read shapes and dtypes only."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tsa_compile.kernels.checks import MAX_HEAD_DIM
from tsa_compile.kernels.common.pages import pages_of

Tensor = torch.Tensor


def append_projected(
    index: Tensor, positions: Tensor, counts: Tensor, query: Tensor, key: Tensor, frequencies: Tensor, k: Tensor,
    placed: Tensor, begin: Tensor, end: Tensor, key_mask: Tensor | None, new: int, heads: Sequence[int],
    interleaved: bool, factor: float,
) -> None:  # fmt: skip
    name, batch = "tsa::append_projected", begin.shape[0]
    if k.dim() != 4 or not k.is_floating_point() or k.shape[0] != batch or not 1 <= k.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(f"{name}: k must be [{batch}, Hk, L, 1 to {MAX_HEAD_DIM}], got {k.dtype} {tuple(k.shape)}")
    if k.device.type == "cuda" and k.dtype == torch.float64:
        raise ValueError(f"{name}: float64 runs on CPU only")
    _check_projection(name, index, positions, key, frequencies, heads, k.shape[1], k.shape[3], factor)
    _check_projection(name, index, positions, query, frequencies, heads, k.shape[1], k.shape[3], factor)
    if index.shape[0] != batch or index.shape[2] != k.shape[2]:
        raise ValueError(f"{name}: index {tuple(index.shape)} does not fit keys {tuple(k.shape)}")
    if counts.dtype != torch.int32 or tuple(counts.shape) != (batch, 1, pages_of(k.shape[2])) or counts.stride(2) != 1:
        wanted = (batch, 1, pages_of(k.shape[2]))
        raise ValueError(f"{name}: counts must be int32 {wanted}, got {counts.dtype} {tuple(counts.shape)}")
    for label, x in (("begin", begin), ("end", end)):
        if x.dtype != torch.int32 or x.dim() != 1 or not x.is_contiguous() or x.shape != begin.shape:
            raise ValueError(f"{name}: {label} must be contiguous int32 [{batch}], got {x.dtype} {tuple(x.shape)}")
    if placed.dtype not in (torch.int32, torch.int64) or _not_rows(placed, batch, new):
        raise ValueError(f"{name}: placed must be integers [1 or {batch}, {new}], got {placed.dtype} {tuple(placed.shape)}")
    _check_mask(name, key_mask, batch)
    if new < 0:
        raise ValueError(f"{name}: new must be at least 0, got {new}")


def projected_scores(
    q: Tensor, index: Tensor, positions: Tensor, query: Tensor, frequencies: Tensor, start: Tensor | None,
    lengths: Tensor | None, key_mask: Tensor | None, heads: Sequence[int], interleaved: bool, factor: float,
) -> None:  # fmt: skip
    name = "tsa::projected_scores"
    if q.dim() != 4 or q.shape[2] != 1 or not 1 <= q.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(f"{name}: q must be [B, H, 1, 1 to {MAX_HEAD_DIM}], got {tuple(q.shape)}")
    _check_projection(name, index, positions, query, frequencies, heads, q.shape[1], q.shape[3], factor)
    if index.shape[0] != q.shape[0]:
        raise ValueError(f"{name}: q has {q.shape[0]} rows of a batch and index {index.shape[0]}")
    _check_range(name, q.shape[0], start, lengths)
    _check_mask(name, key_mask, q.shape[0])
    if key_mask is not None and key_mask.shape[1] != index.shape[2]:
        raise ValueError(f"{name}: key_mask has {key_mask.shape[1]} rows and index {index.shape[2]}")


def join_pages(
    indices: Tensor, list_counts: Tensor, start: Tensor | None, lengths: Tensor | None, capacity: int, owners: Sequence[int],
    sinks: Sequence[int], recent: Sequence[int],
) -> None:  # fmt: skip
    name = "tsa::join_pages"
    if indices.dtype != torch.int32 or indices.dim() != 3 or indices.stride(2) != 1:
        raise ValueError(f"{name}: indices must be int32 [B, lists, N], entries contiguous, got {indices.dtype}, {indices.shape}")
    if list_counts.dtype != torch.int32 or list_counts.shape != indices.shape[:2] or not list_counts.is_contiguous():
        wanted = tuple(indices.shape[:2])
        raise ValueError(f"{name}: list_counts must be contiguous int32 {wanted}, got {list_counts.dtype} {list_counts.shape}")
    _check_range(name, indices.shape[0], start, lengths)
    if len(owners) != indices.shape[1] or not all(0 <= g < len(recent) for g in owners):
        raise ValueError(f"{name}: owners must be {indices.shape[1]} of {len(recent)} KV heads, got {list(owners)}")
    if len(sinks) != len(recent) or min(capacity, *sinks, *recent) < 0:
        got = f"{capacity}, {list(sinks)} and {list(recent)}"
        raise ValueError(f"{name}: capacity and sinks and recent, one for each KV head, must be at least 0, got {got}")


def _check_projection(
    name: str, index: Tensor, positions: Tensor, weight: Tensor, frequencies: Tensor, heads: Sequence[int], most: int, dim: int,
    factor: float,
) -> None:  # fmt: skip
    """The index, its rows' positions, and what projects a head of `dim` numbers into it."""
    if index.dim() != 4 or not index.is_floating_point() or index.stride()[2:] != (index.shape[3], 1):
        raise ValueError(f"{name}: index must be [B, lists, L, r], rows in one piece, got {index.dtype} {tuple(index.shape)}")
    if positions.dtype != torch.int32 or positions.shape != (index.shape[0], 1, index.shape[2]) or positions.stride(2) != 1:
        wanted = (index.shape[0], 1, index.shape[2])
        raise ValueError(f"{name}: positions must be int32 {wanted}, got {positions.dtype} {tuple(positions.shape)}")
    if tuple(weight.shape) != (index.shape[1], index.shape[3], dim) or not weight.is_contiguous():
        wanted = (index.shape[1], index.shape[3], dim)
        raise ValueError(f"{name}: weights must be contiguous {wanted}, got {tuple(weight.shape)}")
    if frequencies.dtype != torch.float32 or frequencies.dim() != 1 or not 1 <= 2 * frequencies.shape[0] <= dim:
        got = f"{frequencies.dtype} {tuple(frequencies.shape)}"
        raise ValueError(f"{name}: frequencies must be float32 [1 to {dim // 2}], got {got}")
    if len(heads) != index.shape[1] or not all(0 <= h < most for h in heads):
        raise ValueError(f"{name}: heads must be {index.shape[1]} of {most}, got {list(heads)}")
    if factor == 0:
        raise ValueError(f"{name}: factor must not be 0")


def _check_range(name: str, batch: int, start: Tensor | None, lengths: Tensor | None) -> None:
    for label, x in (("start", start), ("lengths", lengths)):
        if x is not None and (x.dtype != torch.int32 or tuple(x.shape) != (batch,) or not x.is_contiguous()):
            raise ValueError(f"{name}: {label} must be contiguous int32 [{batch}], got {x.dtype} {tuple(x.shape)}")


def _check_mask(name: str, key_mask: Tensor | None, batch: int) -> None:
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.dim() != 2 or key_mask.shape[0] != batch):
        raise ValueError(f"{name}: key_mask must be bool [{batch}, rows], got {key_mask.dtype} {tuple(key_mask.shape)}")


def _not_rows(placed: Tensor, batch: int, new: int) -> bool:
    return placed.dim() != 2 or placed.shape[0] not in (1, batch) or placed.shape[1] != new or placed.stride(1) != 1
