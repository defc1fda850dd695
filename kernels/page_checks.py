"""Checks of the operators on a page index: sums and counts of the pages of a cache. They read shapes and dtypes only."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tsa_compile.kernels.checks import MAX_HEAD_DIM
from tsa_compile.kernels.common.pages import CHUNK, PAGE, pages_of
from tsa_compile.kernels.decode_checks import MAX_ROWS, check_view
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor


def check_index(name: str, sums: Tensor | None, counts: Tensor, view: KvView, capacity: int) -> None:
    """Raise a ValueError that names operator `name`, unless the index has the pages of rows of `capacity` positions."""
    if view.blocks is not None and view.block % PAGE:
        raise ValueError(f"{name}: block must be a multiple of {PAGE} rows, got {view.block}")
    tensors = {"counts": counts} | ({} if sums is None else {"sums": sums})
    for label, x in tensors.items():
        if x.dim() != 4 - (label == "counts") or x.shape[0] != counts.shape[0] or x.stride(-1) != 1:
            raise ValueError(f"{name}: {label} must be contiguous in its last dimension, got {tuple(x.shape)}, {x.stride()}")
    if counts.dtype != torch.int32 or counts.shape[1] != 1:
        raise ValueError(f"{name}: counts must be int32 [N, 1, pages], got {counts.dtype} {tuple(counts.shape)}")
    if sums is not None and (not sums.is_floating_point() or sums.shape[2] != counts.shape[2]):
        raise ValueError(f"{name}: sums {sums.dtype} {tuple(sums.shape)} and counts {tuple(counts.shape)} differ in pages")
    if view.blocks is None and counts.shape[2] < capacity // PAGE:
        raise ValueError(f"{name}: an index of {counts.shape[2]} pages for {capacity} rows; expected {pages_of(capacity)}")


def append_pages(
    sums: Tensor, counts: Tensor, k: Tensor, blocks: Tensor | None, block: int, start: Tensor | None, begin: Tensor,
    end: Tensor, key_mask: Tensor | None, new: int,
) -> None:  # fmt: skip
    name, view = "tsa::append_pages", KvView(blocks, block, start, end)
    check_append(name, k, view, begin, key_mask, new)
    check_index(name, sums, counts, view, k.shape[2] if blocks is None else blocks.shape[1] * block)
    if tuple(sums.shape[:2]) != tuple(k.shape[:2]) or sums.shape[3] != k.shape[3]:
        raise ValueError(f"{name}: sums {tuple(sums.shape)} do not fit keys {tuple(k.shape)}")


def check_append(name: str, k: Tensor, view: KvView, begin: Tensor, key_mask: Tensor | None, new: int) -> None:
    """Raise a ValueError that names operator `name`, unless rows up to `view.lengths`, from `begin` on new, fit keys `k`."""
    batch = begin.shape[0]
    _check_keys(name, k, view, batch)
    check_view(name, k.new_empty(batch, 0), k, KvView(view.blocks, view.block, begin, view.lengths))
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.dim() != 2 or key_mask.shape[0] != batch):
        raise ValueError(f"{name}: key_mask must be bool [{batch}, rows], got {key_mask.dtype} {tuple(key_mask.shape)}")
    if new < 0:
        raise ValueError(f"{name}: new must be at least 0, got {new}")


def crop_list(since: Tensor, begin: Tensor, counts: Tensor, indices: Tensor, k: Tensor, at: Tensor) -> None:
    _check_lists("tsa::crop_list", since, counts, indices)
    for label, x in (("begin", begin), ("at", at)):
        if x.dtype != torch.int32 or x.shape != since.shape:
            raise ValueError(f"tsa::crop_list: {label} must be int32 {tuple(since.shape)}, got {x.dtype} {tuple(x.shape)}")
    if k.shape[0] != counts.shape[0] or counts.shape[1] not in (1, k.shape[1]):
        raise ValueError(f"tsa::crop_list: k {tuple(k.shape)} has other batch rows or heads than counts {tuple(counts.shape)}")


def list_keys(
    since: Tensor, counts: Tensor, indices: Tensor, scores: Tensor, lse: Tensor, begin: Tensor, keys: int, share: float
) -> None:
    name = "tsa::list_keys"
    _check_lists(name, since, counts, indices)
    batch, lists = counts.shape
    if scores.dim() != 4 or scores.shape[0] != batch or scores.shape[2] != 2 or scores.shape[1] % lists:
        raise ValueError(f"{name}: scores must be [{batch}, heads of {lists} groups, 2, L], got {tuple(scores.shape)}")
    if lse.dim() != 3 or lse.shape[:2] != scores.shape[:2] or lse.shape[2] < 1:
        raise ValueError(f"{name}: lse must be {tuple(scores.shape[:2])} and query rows, got {tuple(lse.shape)}")
    if begin.dtype != torch.int32 or begin.shape != since.shape:
        raise ValueError(f"{name}: begin must be int32 [{batch}], got {begin.dtype} {tuple(begin.shape)}")
    if indices.shape[2] > scores.shape[3]:
        raise ValueError(f"{name}: lists of {indices.shape[2]} keys, of {scores.shape[3]}")
    if keys < 0 or not 0 <= share <= 1:
        raise ValueError(f"{name}: keys must be at least 0 and share in [0, 1], got {keys} and {share}")


def _check_lists(name: str, since: Tensor, counts: Tensor, indices: Tensor) -> None:
    shapes = [tuple(x.shape) for x in (since, counts, indices)]
    fits = indices.dim() == 3 and shapes[1] == shapes[2][:2] and shapes[0] == shapes[1][:1]
    if not fits or any(x.dtype != torch.int32 or not x.is_contiguous() for x in (since, counts, indices)):
        raise ValueError(f"{name}: since [B], counts [B, G] and indices [B, G, N] must be contiguous int32, got {shapes}")


def load_pages(pool: Tensor, store: Tensor, moves: Tensor) -> None:
    name = "tsa::load_pages"
    if pool.dim() != 4 or pool.shape[2] % PAGE:
        raise ValueError(f"{name}: pool must be [B, Hk, a multiple of {PAGE}, D], got {tuple(pool.shape)}")
    batch, kv_heads, _, dim = pool.shape
    wanted = (batch, kv_heads, PAGE, dim)
    if store.dim() != 5 or (store.shape[0], *store.shape[2:]) != wanted or store.dtype != pool.dtype:
        shape = f"[{batch}, pages, {kv_heads}, {PAGE}, {dim}]"
        raise ValueError(f"{name}: store must be {pool.dtype} {shape}, got {store.dtype} {tuple(store.shape)}")
    if store.numel() and store.stride()[3:] != (dim, 1):
        raise ValueError(f"{name}: a page of store must lie in one piece, got strides {store.stride()}")
    if moves.dtype != torch.int32 or moves.dim() != 2 or moves.shape[1] != 3 or not moves.is_contiguous():
        raise ValueError(f"{name}: moves must be contiguous int32 [n, 3], got {moves.dtype} {tuple(moves.shape)}")
    if moves.device != pool.device:
        raise ValueError(f"{name}: moves must be on {pool.device}, got {moves.device}")


def page_sums(
    k: Tensor, blocks: Tensor | None, block: int, start: Tensor | None, lengths: Tensor | None, key_mask: Tensor | None,
    name: str = "tsa::page_sums",
) -> None:  # fmt: skip
    view = KvView(blocks, block, start, lengths)
    batch = k.shape[0] if blocks is None else blocks.shape[0]
    _check_keys(name, k, view, batch)
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.dim() != 2 or key_mask.shape[0] != batch):
        raise ValueError(f"{name}: key_mask must be bool [{batch}, rows], got {key_mask.dtype} {tuple(key_mask.shape)}")


def page_scores(
    q: Tensor, sums: Tensor, counts: Tensor, blocks: Tensor | None, block: int, start: Tensor | None,
    lengths: Tensor | None, capacity: int, scale: float,
) -> None:  # fmt: skip
    name, view = "tsa::page_scores", KvView(blocks, block, start, lengths)
    if q.dim() != 4 or not 1 <= q.shape[2] <= MAX_ROWS or not 1 <= q.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(f"{name}: q must be [B, H, 1 to {MAX_ROWS}, 1 to {MAX_HEAD_DIM}], got {tuple(q.shape)}")
    check_index(name, sums, counts, view, capacity)
    if q.shape[1] % sums.shape[1] or q.shape[3] != sums.shape[3]:
        raise ValueError(f"{name}: q {tuple(q.shape)} does not fit sums {tuple(sums.shape)}")
    check_table(name, q, view)


def select_pages(
    logits: Tensor, parts: Tensor, counts: Tensor, blocks: Tensor | None, block: int, start: Tensor | None,
    lengths: Tensor | None, capacity: int, kv_heads: int, keep: Sequence[float], table: Sequence[int], mass: float,
    sinks: int, recent: int,
) -> None:  # fmt: skip
    name, view = "tsa::select_pages", KvView(blocks, block, start, lengths)
    pages = pages_of(capacity)
    for label, x, size in (("logits", logits, pages), ("parts", parts, -(-pages // CHUNK))):
        if x.dtype != torch.float32 or tuple(x.shape) != (*logits.shape[:3], size) or not x.is_contiguous():
            raise ValueError(f"{name}: {label} must be contiguous float32 [B, H, rows, {size}], got {x.dtype} {tuple(x.shape)}")
    check_index(name, None, counts, view, capacity)
    check_table(name, logits, view)
    if kv_heads < 1 or logits.shape[1] % kv_heads:
        raise ValueError(f"{name}: kv_heads must divide {logits.shape[1]} heads, got {kv_heads}")
    check_budget(name, kv_heads, keep, table, mass, sinks, recent)


def check_budget(
    name: str, kv_heads: int, keep: Sequence[float], table: Sequence[int], mass: float, sinks: int, recent: int
) -> None:
    """Raise a ValueError that names operator `name`, unless the numbers of a budget of pages are within their ranges."""
    if len(keep) not in (1, kv_heads) or not all(0 <= x <= 1 for x in keep):
        raise ValueError(f"{name}: keep must be one share in [0, 1] or one for each of {kv_heads} KV heads, got {list(keep)}")
    if not table or min(table) < 0 or not 0 <= mass <= 1 or sinks < 0 or recent < 1:
        raise ValueError(
            f"{name}: table must have entries >= 0, mass be in [0, 1], sinks >= 0 and recent >= 1,"
            f" got {list(table)}, {mass}, {sinks} and {recent}"
        )


def _check_keys(name: str, k: Tensor, view: KvView, batch: int) -> None:
    if k.dim() != 4 or not k.is_floating_point() or not 1 <= k.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(f"{name}: k must be [N, Hk, L, 1 to {MAX_HEAD_DIM}], got {k.dtype} {tuple(k.shape)}")
    if k.device.type == "cuda" and k.dtype == torch.float64:
        raise ValueError(f"{name}: float64 runs on CPU only")
    if view.blocks is not None and view.block % PAGE:
        raise ValueError(f"{name}: block must be a multiple of {PAGE} rows, got {view.block}")
    check_view(name, k.new_empty(batch, 0), k, view)


def check_table(name: str, q: Tensor, view: KvView) -> None:
    """Raise a ValueError that names operator `name`, unless the parts of a view that are read without its keys fit `q`."""
    for label, x in (("start", view.start), ("lengths", view.lengths)):
        if x is not None and (x.dtype != torch.int32 or tuple(x.shape) != (q.shape[0],) or not x.is_contiguous()):
            raise ValueError(f"{name}: {label} must be contiguous int32 [{q.shape[0]}], got {x.dtype} {tuple(x.shape)}")
    x = view.blocks
    if x is not None and (x.dtype != torch.int32 or x.dim() != 2 or x.shape[0] != q.shape[0] or x.stride(1) != 1):
        raise ValueError(f"{name}: blocks must be int32 [{q.shape[0]}, P], rows contiguous, got {x.dtype} {tuple(x.shape)}")
