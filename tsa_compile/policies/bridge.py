"""Fixed blocks whose boundaries are bridged: local attention in which every token can still depend on every earlier one.

With fixed blocks in every layer nothing crosses a boundary at any depth; a few causal edges over each boundary, with the same
projections and in the same softmax, repair that. "Locality Does Not Imply Reachability", arXiv 2606.02680; `tsa.reach` proves
what a plan reaches. No selection: what a row reads depends on its position alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.edges import Edges
from tsa_compile.kernels.key_block_checks import MAX_SOURCES
from tsa_compile.kernels.types import Selection
from tsa_compile.passes.site import VERIFY_ROWS, AttentionSite
from tsa_compile.policies.base import Emit, Policy, check_int
from tsa_compile.policies.block_sparse import padding, places

MAX_BLOCK = 1 << 16


@dataclasses.dataclass(frozen=True)
class Bridge(Policy):
    """A row reads its block up to itself; the first `w_t` rows of a block also read the last `w_s` tokens before it.

    Positions count from a batch row's first token, so padding on the left moves nothing. The paper gives no widths; a start is
    `max(16, block // 8)` for both. `w_t = 0` or `w_s = 0` are the fixed blocks that are not repaired, of which a report warns.
    Staggered blocks: a plan gives half of the layers another `offset`, such as
    `Plan(Bridge(512, 0, 0), rules=[("*.layers.*[13579].*", "prefill", Bridge(512, 0, 0, offset=256))])`.

    Args:
        block: tokens of a block, up to 65,536.
        w_t: rows at the beginning of each block that read over the boundary, up to `block`.
        w_s: tokens before the block that they read; `block` is the paper's source-extended form.
        offset: tokens of the first block, below `block`; 0: it is a whole one.

    Raises:
        ValueError: a field is outside its range; the message names it.
    """

    by_rows: ClassVar[bool] = True

    block: int
    w_t: int
    w_s: int
    offset: int = 0

    def __post_init__(self) -> None:
        check_int(self, "block", 1, MAX_BLOCK)
        check_int(self, "w_t", 0, self.block)
        check_int(self, "w_s", 0, MAX_SOURCES - 1)
        check_int(self, "offset", 0, self.block - 1)

    @classmethod
    def source_extended(cls, block: int, w_t: int, offset: int = 0) -> Bridge:
        """The wider form: the first rows of a block read all of the block before."""
        return cls(block, w_t, block, offset)

    @classmethod
    def overlapping(cls, block: int, overlap: int, offset: int = 0) -> Bridge:
        """Overlapping windows: every row reads, beside its block, the last `overlap` tokens before it."""
        return cls(block, block, overlap, offset)

    def refuse(self, site: AttentionSite) -> str | None:
        return None

    def guaranteed(self, site: AttentionSite) -> Edges:
        return Edges.bridges(self.block, self.w_t, self.w_s, self.offset)

    def attend(self, emit: Emit, site: AttentionSite, selection: Selection | None) -> Any:
        x, (start, lengths, key_mask) = site.operands, padding(emit, site)
        blocks, block, length = places(site)
        rest = (blocks, block, start, lengths, key_mask, site.scale, self.block, self.w_t, self.w_s, self.offset, False)
        if site.past and not isinstance(site.q_len, int):  # the operator alone knows how many rows there are
            length["min_queries"] = max(self.min_queries, VERIFY_ROWS)
        return emit(torch.ops.tsa.bridge_attention.default, x.q, x.k, x.v, *rest, **length)[0]
