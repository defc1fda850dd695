"""Lists of query heads joined on the GPU: the launch of device.py. The contract is docs/operators.md, `join_pages`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tsa_compile.kernels.common.launch import constant
from tsa_compile.kernels.common.launcher import launch
from tsa_compile.kernels.common.pages import pages_of

Tensor = torch.Tensor


def join_pages(
    indices: Tensor,
    list_counts: Tensor,
    start: Tensor | None,
    lengths: Tensor | None,
    capacity: int,
    owners: Sequence[int],
    sinks: Sequence[int],
    recent: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """`tsa::join_pages` by Triton. Nothing waits for the device; no length compiles anything."""
    from tsa_compile.kernels.select.joined_pages.device import join_pages_kernel

    (batch, lists, _), kv_heads, pages, device = indices.shape, len(recent), pages_of(capacity), indices.device
    out = torch.empty(batch, kv_heads, pages, dtype=torch.int32, device=device)
    counts = torch.empty(batch, kv_heads, dtype=torch.int32, device=device)
    if counts.numel() == 0:
        return out, counts
    flags = torch.zeros(batch, kv_heads, pages, dtype=torch.int8, device=device)
    rule = [constant(tuple(x), torch.int32, device) for x in (owners, sinks, recent)]
    launch(
        join_pages_kernel, (batch * kv_heads,), (indices, list_counts, flags, out, counts, start, lengths, *rule),
        (*indices.stride()[:2], lists, kv_heads, capacity, pages), BLOCK=1024, num_warps=8,
    )  # fmt: skip
    return out, counts
