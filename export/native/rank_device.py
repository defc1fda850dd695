"""The one kernel that the native library needs beside the project's own: PyTorch runs `cumsum` in its place. Triton."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["k_len"])
def rank_kernel(key_mask, ranks, k_len, BLOCK: tl.constexpr):
    """ranks[b, i] = number of true entries of key_mask[b, :i + 1]; uint8 [B, Lk] -> int32 [B, Lk]."""
    key_mask += tl.program_id(0).to(tl.int64) * k_len
    ranks += tl.program_id(0).to(tl.int64) * k_len
    seen = tl.zeros([], tl.int32)
    for start in tl.range(0, k_len, BLOCK):
        i = start + tl.arange(0, BLOCK)
        real = (tl.load(key_mask + i, mask=i < k_len, other=0) != 0).to(tl.int32)
        tl.store(ranks + i, seen + tl.cumsum(real, 0), mask=i < k_len)
        seen += tl.sum(real)
