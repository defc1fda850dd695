"""Where a program is in its grid. CUDA's grids end at 2^31 - 1 in x but at 65,535 in y and z. Triton."""

import triton
import triton.language as tl


@triton.jit
def tile_and_row(tiles):
    """(tile, row) in a grid of tiles * rows programs, in which the tiles of a row are side by side."""
    return tl.program_id(0) % tiles, tl.program_id(0) // tiles


@triton.jit
def tile_of_yz():
    """The tile, in a grid whose y and z are `launch.tiles_in_yz`."""
    return tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)
