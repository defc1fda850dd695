"""Teams of pages on the GPU: the launch of device.py. The contract is docs/operators.md, `append_teams`."""

from __future__ import annotations

import torch

from tsa_compile.kernels.common.launcher import launch
from tsa_compile.kernels.common.pages import PAGE, append_numbers
from tsa_compile.kernels.common.sizes import cdiv, next_power_of_2
from tsa_compile.kernels.state.append_teams.reference import build
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor
PAGES_AT_ONCE = 4


def append_teams(
    teams: Tensor,
    k: Tensor,
    blocks: Tensor | None,
    block: int,
    start: Tensor | None,
    begin: Tensor,
    end: Tensor,
    key_mask: Tensor | None,
    new: int,
    count: int,
) -> None:
    """`tsa::append_teams` by Triton. Nothing waits for the device; no number of rows compiles anything."""
    from tsa_compile.kernels.state.append_teams.device import append_teams_kernel

    batch, kv_heads, dim = begin.shape[0], k.shape[1], k.shape[3]
    if teams.numel() == 0 or batch == 0:
        return
    launch(
        append_teams_kernel, (batch * kv_heads, cdiv(new // PAGE + 1, PAGES_AT_ONCE)),
        (teams, k, blocks, start, begin, end, key_mask), append_numbers(k, teams.stride()[:2], blocks, block, key_mask),
        D=dim, BLOCK_D=max(16, next_power_of_2(dim)), PAGES=PAGES_AT_ONCE, COUNT=count, num_warps=1,
    )  # fmt: skip


def page_teams(
    k: Tensor,
    blocks: Tensor | None,
    block: int,
    start: Tensor | None,
    lengths: Tensor | None,
    key_mask: Tensor | None,
    count: int,
) -> Tensor:
    """`tsa::page_teams` by Triton."""
    return build(append_teams, k, KvView(blocks, block, start, lengths), key_mask, count)
