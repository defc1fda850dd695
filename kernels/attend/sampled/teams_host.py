"""Attention to sampled teams of keys, on the GPU. The contract is docs/operators.md, `team_attention`."""

from __future__ import annotations

import torch

from tsa_compile.kernels.attend.sampled.config import heads_at_once
from tsa_compile.kernels.attend.sampled.draw import TILE
from tsa_compile.kernels.attend.sampled.host import MERGED_AT_ONCE, Step, stages
from tsa_compile.kernels.common.launcher import launch
from tsa_compile.kernels.common.pages import PAGE, pages_of
from tsa_compile.kernels.common.results import empty_result
from tsa_compile.kernels.common.sizes import cdiv, next_power_of_2
from tsa_compile.kernels.common.teams import SLOTS
from tsa_compile.kernels.common.tiles import precision
from tsa_compile.kernels.common.view import capacity_of
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor


def team_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    teams: Tensor,
    blocks: Tensor | None,
    block: int,
    start: Tensor | None,
    lengths: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    seed: Tensor,
    draws: int,
    recent: int,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`tsa::team_attention` by Triton. Nothing waits for the device; no length compiles anything.

    Scratch: 48 bytes for each query head and page, 4 for each draw of a head.
    """
    from tsa_compile.kernels.attend.sampled import teams_device as device
    from tsa_compile.kernels.attend.sampled.teams_read_device import team_attention_kernel
    from tsa_compile.kernels.common.splits_device import merge_kernel

    out, lse = empty_result(q, v), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    x = Step(q, k, v, KvView(blocks, block, start, lengths), key_mask, None, sinks, seed, draws, scale, 0.0)
    (batch, heads), slots, shape = q.shape[:2], pages_of(capacity_of(k, x.view)) * SLOTS, x.shapes
    phis, ranks = x.new(batch, heads, slots, dtype=torch.float32), x.new(batch, heads, slots)
    places, cuts, counts, listed = (x.new(batch, heads, *rest) for rest in ((slots,), (), (), (draws,)))
    block_m, tiles_m = heads_at_once(x.group, shape["BLOCK_D"] * q.element_size())
    of_keys = (*q.stride()[:2], q.stride(3), *k.stride())
    of_index = (*teams.stride()[:2], *((0, 0) if key_mask is None else key_mask.stride()), x.table_stride)
    of_cache = (
        x.group, capacity_of(k, x.view), block, x.per_row, max(1, block // PAGE), max(1, teams.shape[2] // max(1, block // PAGE)),
        slots, recent,
    )  # fmt: skip
    keys = {name: shape[name] for name in ("D", "BLOCK_D")}
    splits = x.splits(x.lists * tiles_m, x.tiles)
    launch(
        device.team_scores_kernel, (x.lists * tiles_m, splits), 
        (q, k, teams, phis, ranks, blocks, start, lengths, key_mask, seed),
        (*of_keys, *of_index, x.seed_stride, k.shape[1], *of_cache, splits, tiles_m, scale),
        **keys, BLOCK_M=block_m, BLOCK_G=min(block_m, next_power_of_2(x.group)), PRECISION=precision(q.dtype),
        num_warps=4, num_stages=stages(x, shape["BLOCK_D"]),
    )  # fmt: skip
    of_cut = (heads, capacity_of(k, x.view), slots, recent, draws)
    launch(device.team_cut_kernel, (batch * heads,), (ranks, places, cuts, listed, counts, start, lengths), of_cut, num_warps=16)
    splits = x.splits(batch * heads, cdiv(draws + recent, TILE // PAGE))
    part, part_lse = (x.new(batch, heads, splits, *rest, dtype=torch.float32) for rest in ((v.shape[3],), ()))
    launch(
        team_attention_kernel, (batch * heads, splits),
        (q, k, v, teams, phis, cuts, listed, counts, part, part_lse, blocks, start, lengths, key_mask),
        (*of_keys, *v.stride(), *of_index, heads, *of_cache, draws, splits, scale), **shape,
        PRECISION=precision(q.dtype), num_warps=4, num_stages=stages(x, shape["BLOCK_D"] + shape["BLOCK_DV"]),
    )  # fmt: skip
    launch(
        merge_kernel, (batch * heads,), (part, part_lse, out, lse, sinks), (*out.stride()[:3], heads, 1, splits),
        DV=shape["DV"], BLOCK_DV=shape["BLOCK_DV"], BLOCK_S=MERGED_AT_ONCE, num_warps=4 if shape["BLOCK_DV"] <= 128 else 8,
    )  # fmt: skip
    return out, lse
