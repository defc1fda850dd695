"""From a row's first real key to its last. Triton."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["k_len"])
def mask_range_kernel(key_mask, start, lengths, m_sb, m_sl, k_len, BLOCK: tl.constexpr):
    """key_mask bool [B, Lk], to start and lengths int32 [B]; 0 and 0 where no key is real. One program a row."""
    b = tl.program_id(0)
    key_mask += b.to(tl.int64) * m_sb
    first, end = k_len, 0
    for begin in tl.range(0, k_len, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        real = tl.load(key_mask + at * m_sl, mask=at < k_len, other=0) != 0
        first = tl.minimum(first, tl.min(tl.where(real, at, k_len), 0))
        end = tl.maximum(end, tl.max(tl.where(real, at + 1, 0), 0))
    first = tl.minimum(first, end)
    tl.store(start + b, first)
    tl.store(lengths + b, end - first)
