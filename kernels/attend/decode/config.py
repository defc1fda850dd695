"""How decode attention is cut into programs: tiles by head dim, dtype and GPU."""

from __future__ import annotations

import dataclasses

import torch

STAGE_BYTES = 32 << 10  # of keys and values that one step of a program's loop copies
#: The same on Hopper in half precision, three in flight and one program on a multiprocessor: on an H200 within 3 % of the fastest
#: dense attention from 32K keys on, where two programs with half of it each were 0.5 to 7 % behind. Of pages, three programs with
#: half of it are 4 % ahead.
HOPPER_STAGE_BYTES = 64 << 10
QUERY_BYTES = 16 << 10  # of a tile's query rows


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Args:
    block_m: query rows of a tile: rows of the step times query heads of a KV head, padded to a power of two from 16 on.
    block_n: keys of a tile.
    num_warps, num_stages: of a program.
    resident: programs that a multiprocessor holds at a time.
    swap: tiles of scores are [keys, queries].
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    resident: int
    swap: bool = False


def decode_config(
    queries: int,
    block_d: int,
    block_dv: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    biased: bool = False,
    pages: bool = False,
    scores: bool = False,
) -> DecodeConfig:
    """Never by length, so no length compiles anything.

    Args:
        queries: rows of the step times query heads of a KV head.
        block_d, block_dv: head dims of keys and values, padded to powers of two.
        biased: tiles of a mask are copied too.
        pages: the keys of some pages are read, not all.
        scores: those of two rows are left, too, for whose tile four warps on Hopper have not the registers.
    """
    row_bytes = (block_d + block_dv) * dtype.itemsize
    large = capability[0] == 9 and dtype != torch.float32 and max(block_d, block_dv) <= 128 and not (biased or pages)
    stage_bytes = HOPPER_STAGE_BYTES if large else STAGE_BYTES
    block_n = min(128, max(16, _floor_power_of_2(stage_bytes // row_bytes)))
    most = min(64, max(16, QUERY_BYTES // (block_d * dtype.itemsize)))
    block_m = min(most, max(16, 1 << (queries - 1).bit_length()))
    resident = {9: 3, 10: 3}.get(capability[0], 2 if capability in ((8, 0), (8, 7)) else 1)  # of 228, 164 and 100 KB
    if block_n * row_bytes > STAGE_BYTES:
        resident = 1
    wide = block_n * row_bytes > stage_bytes or dtype == torch.float32 or (biased and resident == 1)
    return DecodeConfig(block_m, block_n, 8 if scores else 4, 2 if wide else 3, resident)


def _floor_power_of_2(x: int) -> int:
    return 1 << max(0, x.bit_length() - 1)
