"""What one side of the Hopper prefill tells the other of a tile. In Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

INFO = gl.constexpr(gl.BlockedLayout([4], [32], [4], [0]))


@gluon.jit
def announce(info, rows, announced, tile, at, blocks, b, h, quick):
    """Tells who computes of the program's tile number `tile`: its key blocks (0: there is no more tile), batch and head, the rows
    of its queries (negative: none), and how many of its blocks are `quick` (`attend`, hopper_attend_device.py)."""
    i = gl.arange(0, 4, layout=INFO)
    info.index(tile % 2).store(gl.where(i == 0, blocks, gl.where(i == 1, b, gl.where(i == 2, h, quick))))
    rows.index(tile % 2).store(at)
    mbarrier.arrive(announced.index(tile % 2))


@gluon.jit
def read_info(info, i: gl.constexpr):
    """Entry i of a tile's: 0 its key blocks, 1 its batch, 2 its head, 3 how many blocks are `quick`."""
    return gl.sum(gl.where(gl.arange(0, 4, layout=INFO) == i, info.load(INFO), 0), 0)
