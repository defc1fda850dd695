"""What the two sides of the Hopper kernel tell each other of a tile. In Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from tsa_compile.kernels.common.hopper_device import WARPS


@gluon.constexpr_function
def info_layout(warps):
    return gl.BlockedLayout([8], [32], [warps], [0])


@gluon.jit
def announce(info, announced, tile, blocks, masked, online, b, h, row, ahead):
    """By the warp that loads, of its tile number `tile`: its steps (0: there is no more tile), how many of them are masked and
    how many, masked ones included, need a running maximum; batch, head and first query row (negative: it has fewer); and how far
    its first key lies before its first row."""
    i = gl.arange(0, 8, layout=info_layout(1))
    low = gl.where(i == 0, blocks, gl.where(i == 1, masked, gl.where(i == 2, online, b)))
    high = gl.where(i == 4, h, gl.where(i == 5, row, ahead))
    info.index(tile % 2).store(gl.where(i < 4, low, high))
    mbarrier.arrive(announced.index(tile % 2))


@gluon.jit
def read_info(info, i: gl.constexpr):
    """Entry i of `announce`'s, in its order, by a warpgroup that computes."""
    layout: gl.constexpr = info_layout(WARPS)
    return gl.sum(gl.where(gl.arange(0, 8, layout=layout) == i, info.load(layout), 0), 0)
