"""Block-sparse prefill: each block of query rows reads the key blocks that matter to it, as means of both estimate.

After FlashPrefill (arXiv 2603.06199, 2608.19758): a key block is kept whose mass reaches a share of the heaviest block's. Here a
query head has a list of its own, and masses are averaged over softmaxes of pooled queries.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.checks import SHARES
from tsa_compile.kernels.common.row_blocks import KEYS, ROWS, finest_pool, sparse_rows
from tsa_compile.kernels.edges import Edges
from tsa_compile.kernels.types import PageBitmap, Selection
from tsa_compile.passes.site import VERIFY_ROWS, AttentionSite
from tsa_compile.policies.base import Emit, Policy, check_int

Padding = tuple[Any, Any, Any]  # start, lengths and key_mask of the operators


@dataclasses.dataclass(frozen=True)
class BlockSparse(Policy):
    """Blocks of 128 query rows read key blocks of 64; every row keeps its output.

    A row's keys are chosen with the 127 other rows of its block, so a token may depend on later ones of its block, and with
    `last_dense` on where the prompt ends.

    Args:
        alpha: share of the heaviest key block's mass that a block must reach to be read, in [0, 1); 0 reads every key. One
            number, or one for each query head.
        pool: query rows whose mean is scored, a divisor of 128; 1 scores every row.
        window: own and preceding tokens that every row reads, in tokens.
        sinks: first tokens, whose blocks every row reads.
        last_dense: last rows, whose blocks read every key.
        lookahead: whether a row block's own rows choose its keys. False: the rows of the block before it do, so that no row
            depends on a later token (`last_dense` must be 0); the first row block of a chunk then reads every key.
        share: "head": each query head reads blocks of its own; "group": the heads of a KV head read what any of them keeps.

    Raises:
        ValueError: a field is outside its range; the message names it.
    """

    by_rows: ClassVar[bool] = True
    by_length: ClassVar[bool] = True
    reads_blocks: ClassVar[bool] = True

    alpha: float | tuple[float, ...] = 0.05
    pool: int = ROWS
    window: int = 256
    sinks: int = 4
    last_dense: int = 128
    share: str = "head"
    lookahead: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.alpha, list):
            object.__setattr__(self, "alpha", tuple(self.alpha))
        numbers = self.alpha if isinstance(self.alpha, tuple) else (self.alpha,)
        if not numbers or not all(type(a) in (int, float) and 0 <= a < 1 for a in numbers):
            raise ValueError(f"BlockSparse.alpha must be a number in [0, 1), or one for each query head, got {self.alpha!r}")
        check_int(self, "pool", 1, ROWS)
        if ROWS % self.pool:
            raise ValueError(f"BlockSparse.pool must divide {ROWS}, got {self.pool}")
        check_int(self, "window", 1)
        check_int(self, "sinks", 0)
        check_int(self, "last_dense", 0)
        if not isinstance(self.lookahead, bool):
            raise ValueError(f"BlockSparse.lookahead must be a bool, got {self.lookahead!r}")
        if not self.lookahead and self.last_dense:
            raise ValueError(f"BlockSparse.last_dense must be 0 without lookahead, got {self.last_dense}")
        if self.share not in SHARES:
            raise ValueError(f"BlockSparse.share must be one of {SHARES}, got {self.share!r}")

    @property
    def shareable(self) -> bool:
        return True

    def refuse(self, site: AttentionSite) -> str | None:
        if isinstance(self.alpha, tuple) and len(self.alpha) != site.heads:
            return f"alpha has {len(self.alpha)} numbers for {site.heads} query heads"
        dim = site.head_dim
        if site.device.type == "cuda" and isinstance(dim, int) and self.pool < finest_pool(dim):
            return f"pool {self.pool}; from {finest_pool(dim)} on with head dim {dim} on a GPU"
        return None

    def guaranteed(self, site: AttentionSite) -> Edges:
        """The key blocks that the window before a row block touches, and from there up to the row itself."""
        return Edges.every() if self.alpha == 0 else Edges.bridges(ROWS, ROWS, self.before)

    @property
    def before(self) -> int:
        """Tokens before a row block, in whole key blocks, that all of its rows read."""
        return -(-(self.window - 1) // KEYS) * KEYS

    def sparse_rows(self, length: int) -> int:
        """Rows of a prompt of `length` tokens before those that `last_dense` makes dense."""
        return sparse_rows(length, self.last_dense)

    def select(self, emit: Emit, site: AttentionSite, state: Any) -> PageBitmap | None:
        if site.dense_below:
            return None
        x, real = site.operands, padding(emit, site)
        blocks, block, length = places(site)
        means, counts = emit(torch.ops.tsa.key_block_means.default, x.k, *real, blocks, block, **length)
        chosen = (x.q, x.k, means, counts, *real, site.scale, *self.rule)
        return PageBitmap(emit(torch.ops.tsa.select_key_blocks.default, *chosen, **self._options(site), **length))

    def attend(self, emit: Emit, site: AttentionSite, selection: Selection | None) -> Any:
        x, (start, lengths, key_mask) = site.operands, padding(emit, site)
        blocks, block, length = places(site)
        rest = (blocks, block, start, lengths, key_mask, site.scale)
        if selection is None:
            options = {**self._options(site), **length, "dense_below": site.dense_below}
            return emit(torch.ops.tsa.block_sparse_attention.default, x.q, x.k, x.v, *rest, *self.rule, **options)
        assert isinstance(selection, PageBitmap)
        return emit(torch.ops.tsa.key_block_attention.default, x.q, x.k, x.v, selection.bits, *rest, False, **length)[0]

    @property
    def rule(self) -> tuple[Any, ...]:
        """`alpha`, `pool`, `window`, `sinks` and `last_dense`, as the operators take them."""
        alphas = [float(a) for a in (self.alpha if isinstance(self.alpha, tuple) else (self.alpha,))]
        return alphas, self.pool, self.window, self.sinks, self.last_dense

    def _options(self, site: AttentionSite) -> dict[str, Any]:
        varies = site.past and not isinstance(site.q_len, int)  # the operator alone knows how many rows there are
        few = {"min_queries": max(self.min_queries, VERIFY_ROWS)} if varies else {}
        return {"share": self.share, "lookahead": self.lookahead, **few}


def places(site: AttentionSite) -> tuple[Any, int, dict[str, Any]]:
    """`blocks`, `block` and `k_len` of the operators: where keys lie that do not lie in order."""
    view = site.operands.view
    if view.blocks is None or view.ranks is not None:  # ranks: the order of a mask with holes, which the operators take as a mask
        return None, 1, {}
    return view.blocks, view.block, {"k_len": site.k_len}


def padding(emit: Emit, site: AttentionSite) -> Padding:
    """What says which keys are real; None three times without padding."""
    mask = site.operands.key_mask
    if mask is None:
        return None, None, None
    start, lengths = emit(torch.ops.tsa.padding_range.default, mask)
    return start, lengths, mask
