"""ContextParallel: the rows of a prompt are spread over a process group, and only key blocks that a row reads travel.

Each rank computes two chunks of the prompt through all layers, zig-zag as in Llama 3's training (arXiv 2407.21783, 3.3.2), so
that causal work is even. There all keys are gathered; here the ranks choose key blocks as `BlockSparse` does on one process, tell
each other which they lack, and send these.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.types import Selection
from tsa_compile.passes.site import AttentionSite
from tsa_compile.policies.base import Emit
from tsa_compile.policies.block_sparse import BlockSparse
from tsa_compile.policies.over_group import OverGroup

INNER = BlockSparse()


@dataclasses.dataclass(frozen=True)
class ContextParallel(OverGroup):
    """Prefill over a process group, every rank of which runs the same model on the same tokens (`torchrun`, `tsa.transform`).

    Key blocks are those that `inner` chooses on one process, and the result is the same to the dtype's error, on every rank.
    Prompts of fewer than 256 tokens for each rank are computed by every rank as a whole, by `inner`.

    Args:
        inner: which key blocks are read; `BlockSparse(alpha=0)`: all.
        group: name of the process group (`group.group_name`); None: all processes.

    Raises:
        ValueError: a field is outside its range; the message names it.
    """

    by_rows: ClassVar[bool] = True

    inner: BlockSparse = INNER

    def __post_init__(self) -> None:
        if not isinstance(self.inner, BlockSparse):
            raise ValueError(f"ContextParallel.inner must be a BlockSparse, got {self.inner!r}")
        super().__post_init__()

    def refuse(self, site: AttentionSite) -> str | None:
        return self.inner.refuse(site)

    def attend(self, emit: Emit, site: AttentionSite, selection: Selection | None) -> Any:
        x, rule = site.operands, self.inner
        args = (x.q, x.k, x.v, x.key_mask, site.scale, *rule.rule, rule.share, rule.lookahead, self.group_name)
        return emit(torch.ops.tsa.context_parallel_attention.default, *args)
