"""Keys and values of a cache as tiles (`KvView`, types.py), and what hides or weighs scores of a few query rows. Triton."""

import triton
import triton.language as tl

PAGE = tl.constexpr(16)  # rows of a page
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def by_query(x, SWAP: tl.constexpr):
    """A vector over the tile's query rows, to be combined with a tile of scores."""
    return x[None, :] if SWAP else x[:, None]


@triton.jit
def by_key(x, SWAP: tl.constexpr):
    """A vector over the tile's keys, to be combined with a tile of scores."""
    return x[:, None] if SWAP else x[None, :]


@triton.jit
def key_range(start, lengths, b, capacity, rows, window):
    """First position that some query row sees, and the first behind the last that is a key."""
    begin = 0
    if start is not None:
        begin = tl.maximum(tl.load(start + b), 0)
    end = capacity
    if lengths is not None:
        end = tl.minimum(begin + tl.load(lengths + b), capacity)
    first = tl.where(window > 0, tl.maximum(begin, end - rows + 1 - window), begin)
    return first, end


@triton.jit
def keys_of_tile(tile, pages, count, blocks, key_mask, mask_sl, block, first, end, BLOCK_N: tl.constexpr):
    """Of a tile's keys: their positions, entries of the table of blocks (unless None), and which are there to be seen."""
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    j = n
    if pages is not None:
        page = tl.load(pages + n // PAGE, mask=n < count * PAGE, other=-1)
        j = page * PAGE + n % PAGE  # below 0 behind the list's end
    there = (j >= first) & (j < end)
    entry = j
    if blocks is not None:
        entry = tl.load(blocks + j // block, mask=there, other=0)
    if key_mask is not None:
        there = there & tl.load(key_mask + j.to(tl.int64) * mask_sl, mask=there, other=0).to(tl.int1)
    return j, entry, there


@triton.jit
def rows_of_keys(x, x_sb, x_sl, j, entry, blocks, block, per_row, b):
    """Addresses [keys] of the rows of x [N, Hk, L, D] that hold the keys at positions j."""
    if blocks is not None:  # of the table, whose entries count the blocks of all N
        owner, inside = entry // per_row, entry % per_row * block + j % block
        return x + owner.to(tl.int64) * x_sb + inside.to(tl.int64) * x_sl
    return x + b * x_sb + tl.maximum(j, 0).to(tl.int64) * x_sl


@triton.jit
def load_tile(at, x_sd, there, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows at addresses `at`, as a tile [keys, BLOCK_D]: zero where no key is there, which is not read, and beyond D."""
    d = tl.arange(0, BLOCK_D)
    ok = there[:, None] if D == BLOCK_D else there[:, None] & (d < D)[None, :]
    return tl.load(at[:, None] + d[None, :] * x_sd, mask=ok, other=0.0)


@triton.jit
def capped(logits, softcap):
    """softcap * tanh(logits / softcap)."""
    return softcap * (1.0 - 2.0 / (tl.exp2(logits * (2.0 * LOG2_E / softcap)) + 1.0))


@triton.jit
def add_bias(logits, bias, bias_sl, at_query, query_ok, j, there, SWAP: tl.constexpr):
    """Scores plus a mask of numbers, or hidden by a bool mask; (scores, visible). Numbers at or below -1e38 hide."""
    at = bias + by_query(at_query, SWAP) + by_key(tl.maximum(j, 0).to(tl.int64) * bias_sl, SWAP)
    ok = by_query(query_ok, SWAP) & by_key(there, SWAP)
    if bias.dtype.element_ty == tl.int1:
        visible = tl.load(at, mask=ok, other=0).to(tl.int1)
    else:
        value = tl.load(at, mask=ok, other=float("-inf")).to(tl.float32)
        visible = value > -1e38
        logits += tl.where(visible, value, 0.0)
    return logits, visible
