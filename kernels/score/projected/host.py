"""Page scores by projected keys on the GPU: the launch of device.py. The contract is docs/operators.md, `projected_scores`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tsa_compile.kernels.common.launch import constant
from tsa_compile.kernels.common.launcher import launch
from tsa_compile.kernels.common.pages import CHUNK, pages_of
from tsa_compile.kernels.common.sizes import cdiv, next_power_of_2

Tensor = torch.Tensor
PAGES_AT_ONCE = 16  # 256 rows of an index of 16 numbers: 16 KB in float32


def projected_scores(
    q: Tensor,
    index: Tensor,
    positions: Tensor,
    query: Tensor,
    frequencies: Tensor,
    start: Tensor | None,
    lengths: Tensor | None,
    key_mask: Tensor | None,
    heads: Sequence[int],
    interleaved: bool,
    factor: float,
) -> tuple[Tensor, Tensor]:
    """`tsa::projected_scores` by Triton, in float32. Nothing waits for the device; no length compiles anything."""
    from tsa_compile.kernels.score.projected.device import projected_scores_kernel

    batch, lists, capacity, width = index.shape
    dim, pages = q.shape[3], pages_of(capacity)
    chunks = cdiv(pages, CHUNK)
    logits = q.new_empty(batch, lists, 1, pages, dtype=torch.float32)
    parts = q.new_empty(batch, lists, 1, chunks, dtype=torch.float32)
    if logits.numel() == 0:
        return logits, parts
    of_lists = constant(tuple(heads), torch.int32, q.device)
    numbers = (
        q.stride(0), q.stride(1), q.stride(3), *index.stride()[:2], positions.stride(0),
        *((0, 0) if key_mask is None else key_mask.stride()), lists, capacity, pages, chunks, factor,
    )  # fmt: skip
    launch(
        projected_scores_kernel, (batch * lists, chunks),
        (q, index, positions, query, frequencies, logits, parts, start, lengths, key_mask, of_lists), numbers,
        D=dim, R=width, BLOCK_D=max(16, next_power_of_2(dim)), BLOCK_R=max(1, next_power_of_2(width)),
        PAIRS=frequencies.shape[0], INTERLEAVED=interleaved, CHUNK=CHUNK, AT_ONCE=PAGES_AT_ONCE, num_warps=4,
    )  # fmt: skip
    return logits, parts
