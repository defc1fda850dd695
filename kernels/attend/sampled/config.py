"""How attention that reads every key and some values is cut into programs: by head dim, dtype and GPU."""

from __future__ import annotations

import functools
from typing import NamedTuple

from tsa_compile.kernels.attend.sampled.draw import TILE
from tsa_compile.kernels.common.tiles import small_shared

QUERY_BYTES = 16 << 10  # of a program's query rows
RESIDENT = 2  # programs of `mass_kernel` on a multiprocessor


class SampledConfig(NamedTuple):
    """Args:
    tiles: of 64 keys, that a program of `mass_kernel` reads at a time.
    num_warps, num_stages: of such a program.
    resident: such programs that a multiprocessor holds at a time.
    chunk: samples that a program of `sample_kernel` takes at a time.
    draw_warps: of such a program.
    """

    tiles: int
    num_warps: int
    num_stages: int
    resident: int
    chunk: int
    draw_warps: int


@functools.cache
def sampled_config(key_bytes: int, block_dv: int, capability: tuple[int, int]) -> SampledConfig:
    """Never by length, so no length compiles anything; key_bytes: of a row of K; block_dv: numbers of a row of V.

    Copies in flight take as much shared memory as `RESIDENT` programs have, so that keys come at the rate of the memory.
    """
    flight = (48 << 10) if small_shared(capability) else (96 << 10) if capability[0] in (9, 10) else (72 << 10)
    tiles = 2 if 4 * TILE * key_bytes <= flight else 1
    stages = min(4, 1 + flight // (tiles * TILE * key_bytes))
    return SampledConfig(tiles, 4, stages, RESIDENT, max(32, min(64, 16384 // block_dv)), 8)


def heads_at_once(group: int, row_bytes: int) -> tuple[int, int]:
    """(query heads of a KV head in one program, such programs); row_bytes: of a query row, or of the sums of one."""
    block_m = min(64, max(16, QUERY_BYTES // row_bytes), max(16, 1 << (group - 1).bit_length()))
    return block_m, -(-group // block_m)
