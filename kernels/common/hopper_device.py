"""What the Hopper kernels of prefill share: sizes, the ring's turns, the layout of scores and their maximum. In Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from tsa_compile.kernels.common.lanes_device import by_lane

WARPS = gl.constexpr(4)  # of each of the three parts
BLOCK = gl.constexpr(128)  # queries of a tile, keys of a block
#: What a row's sum of exponentials must stay below where no maximum is kept: 2^48 below the end of float32, so that values
#: up to 2^48 leave the product finite. With larger ones, which bfloat16 has, a row may be Inf.
SUM_LIMIT = gl.constexpr(2.0**80)
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
load_block = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # renamed in Triton 3.9


@gluon.jit
def advance(stage, parity, STAGES: gl.constexpr):
    """The ring's next stage, and the parity of its barriers there."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, parity ^ 1, parity)


@gluon.jit
def row_maximum(scores):
    """By pairs first, which shortens the chain of maxima that wait for each other."""
    return gl.convert_layout(gl.max(gl.max(gl.max(by_lane(scores), 3), 1), 1), gl.SliceLayout(1, scores.type.layout))
