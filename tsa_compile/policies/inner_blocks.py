"""Block-sparse attention on the kept tokens, scored by pooled queries and keys (after FlexPrefill, arXiv 2502.20766)."""

from __future__ import annotations

import dataclasses

from tsa_compile.kernels.checks import BLOCKS
from tsa_compile.policies.base import check_int


@dataclasses.dataclass(frozen=True)
class InnerBlocks:
    """An option of `TokenSparse`: each block of queries reads only the blocks of kept tokens that matter to it.

    Blocks are counted among the kept tokens of a head, so that token and block sparsity multiply. For each block of queries the
    heaviest blocks of keys are kept that together hold a share `mass` of the attention, as pooled queries and keys estimate it.

    Args:
        mass: share of the estimated attention mass, in (0, 1].
        block: tokens of a block: 16, 32, 64 or 128.
        pool: tokens whose queries, or keys, are averaged for the estimate; a divisor of `block`, at least a 16th of it.
        sinks: first blocks, always kept.
        local: blocks up to and with the query's own, always kept.

    Raises:
        ValueError: a field is outside its range; the message names it.
    """

    mass: float = 0.95
    block: int = 128
    pool: int = 16
    sinks: int = 1
    local: int = 3

    def __post_init__(self) -> None:
        if isinstance(self.mass, bool) or not isinstance(self.mass, (int, float)) or not 0 < self.mass <= 1:
            raise ValueError(f"InnerBlocks.mass must be a number in (0, 1], got {self.mass!r}")
        if self.block not in BLOCKS:
            raise ValueError(f"InnerBlocks.block must be one of {BLOCKS}, got {self.block!r}")
        check_int(self, "pool", 1, self.block)
        if self.block % self.pool or self.block // self.pool > 16:
            raise ValueError(f"InnerBlocks.pool must divide block ({self.block}) into at most 16 parts, got {self.pool}")
        check_int(self, "sinks", 0)
        check_int(self, "local", 1)
