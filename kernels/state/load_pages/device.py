"""Pages from a store into slots of a pool. Triton."""

import triton
import triton.language as tl

from tsa_compile.kernels.common.pages_device import PAGE


@triton.jit
def load_pages_kernel(
    pool, store, moves, pool_sb, pool_sh, pool_sl, pool_sd, store_sb, store_sp, store_sh,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (moves, Hk): 16 rows of one head. The store's rows lie one behind the other, so reads over the bus are wide.

    Args:
        pool: [B, Hk, L, D]. store: [B, pages, Hk, 16, D], where the GPU can read it. moves: int32 [n, 3], row, page, slot.
    """
    move, head = moves + tl.program_id(0).to(tl.int64) * 3, tl.program_id(1).to(tl.int64)
    row, page, slot = (tl.load(move).to(tl.int64), tl.load(move + 1).to(tl.int64), tl.load(move + 2).to(tl.int64))
    r, d = tl.arange(0, PAGE)[:, None], tl.arange(0, BLOCK_D)[None, :]
    ok = (r < PAGE) & (d < D)
    x = tl.load(store + row * store_sb + page * store_sp + head * store_sh + r * D + d, mask=ok, other=0.0)
    tl.store(pool + row * pool_sb + head * pool_sh + (slot * PAGE + r) * pool_sl + d * pool_sd, x, mask=ok)
