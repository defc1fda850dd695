"""Checks of the operators on teams: 64 bits for each page of a cache. They read shapes and dtypes only."""

from __future__ import annotations

import torch

from tsa_compile.kernels.common.pages import PAGE, pages_of
from tsa_compile.kernels.common.teams import SLOTS
from tsa_compile.kernels.decode_checks import MAX_SAMPLES, check_cache, check_masks, check_seed
from tsa_compile.kernels.page_checks import check_append, page_sums
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor


def append_teams(
    teams: Tensor, k: Tensor, blocks: Tensor | None, block: int, start: Tensor | None, begin: Tensor, end: Tensor,
    key_mask: Tensor | None, new: int, count: int,
) -> None:  # fmt: skip
    name, view = "tsa::append_teams", KvView(blocks, block, start, end)
    check_append(name, k, view, begin, key_mask, new)
    check_teams(name, teams, k, view)
    _check_count(name, count)


def page_teams(
    k: Tensor,
    blocks: Tensor | None,
    block: int,
    start: Tensor | None,
    lengths: Tensor | None,
    key_mask: Tensor | None,
    count: int,
) -> None:
    page_sums(k, blocks, block, start, lengths, key_mask, "tsa::page_teams")
    _check_count("tsa::page_teams", count)


def team_attention(
    q: Tensor, k: Tensor, v: Tensor, teams: Tensor, blocks: Tensor | None, block: int, start: Tensor | None,
    lengths: Tensor | None, key_mask: Tensor | None, scale: float, seed: Tensor, draws: int, recent: int,
    sinks: Tensor | None = None,
) -> None:  # fmt: skip
    name, view = "tsa::team_attention", KvView(blocks, block, start, lengths)
    capacity = check_cache(name, q, k, v, view, key_mask)
    check_masks(name, q, capacity, None, sinks, 0.0, 0, causal=True)
    check_teams(name, teams, k, view)
    check_seed(name, q, seed)
    if q.shape[2] != 1:
        raise ValueError(f"{name}: q must have 1 row, got {q.shape[2]}")
    if not 1 <= draws <= MAX_SAMPLES or recent < 1:
        raise ValueError(f"{name}: draws must be 1 to {MAX_SAMPLES} and recent at least 1, got {draws} and {recent}")


def check_teams(name: str, teams: Tensor, k: Tensor, view: KvView) -> None:
    """Raise a ValueError that names operator `name`, unless the teams are those of the cache's pages."""
    if view.blocks is not None and view.block % PAGE:
        raise ValueError(f"{name}: block must be a multiple of {PAGE} rows, got {view.block}")
    fits = teams.dtype == torch.int64 and teams.dim() == 3 and teams.shape[:2] == k.shape[:2] and teams.stride(2) == 1
    if not fits or teams.shape[2] < k.shape[2] // PAGE:
        wanted = f"int64 {(*k.shape[:2], pages_of(k.shape[2]))}, rows contiguous"
        raise ValueError(f"{name}: teams must be {wanted}, got {teams.dtype} {tuple(teams.shape)}, strides {teams.stride()}")


def _check_count(name: str, count: int) -> None:
    if not 1 <= count <= SLOTS:
        raise ValueError(f"{name}: count must be 1 to {SLOTS}, got {count}")
