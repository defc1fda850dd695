"""Which positions of a batch row are keys (`KvView.start`, `KvView.lengths`). Triton."""

import triton
import triton.language as tl


@triton.jit
def valid_range(starts, lengths, b, k_len, START: tl.constexpr, LENGTH: tl.constexpr):
    """The first position of batch row b that is a key, and the one behind the last. START, LENGTH: which are given."""
    first = 0
    end = k_len
    if START:
        first = tl.minimum(tl.maximum(tl.load(starts + b), 0), k_len)
    if LENGTH:
        end = tl.minimum(first + tl.maximum(tl.load(lengths + b), 0), k_len)
    return first, end


@triton.jit
def valid_keys(at, starts, lengths, key_mask, b, k_len, m_sb, START: tl.constexpr, LENGTH: tl.constexpr, MASK: tl.constexpr):
    """Whether the positions `at` of batch row b hold keys. MASK: key_mask bool [B, Lk], rows m_sb apart, is given."""
    first, end = valid_range(starts, lengths, b, k_len, START, LENGTH)
    ok = (at >= first) & (at < end)
    if MASK:
        ok &= tl.load(key_mask + b * m_sb + at, mask=ok, other=0) != 0
    return ok
