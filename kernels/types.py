"""The types that meet in every kernel: which keys are kept, and where a key lies. A leaf: imports torch alone.

All are NamedTuples of tensors and numbers: an operator takes them flat (`*view`, `*selection`), a graph holds nodes in them,
eager code tensors. `T` below is a tensor, or the graph node of one.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

T: TypeAlias = Any


class KvView(NamedTuple):
    """Where the keys and values of each batch row lie: block `p` of row `b` is block `blocks[b, p]` of K and V.

    Positions count from 0 within a row; position `j` lies in block `j // block`. Left padding is `start`, right padding
    `lengths`, holes in a mask `block = 1`. Pages of a server, a pool of resident blocks, packed sequences are instances.

    Args:
        blocks: int32 `[B, P]`, or None: the tensor itself, block `p` at `[p * block, (p + 1) * block)`.
        block: rows of a block. 1 with `blocks`: each key by its own index (gather).
        start: int32 `[B]`, the first position that is a key; None: 0 in every row.
        lengths: int32 `[B]`, positions from `start` on that are keys; None: all of the tensor.
        ranks: int32 `[B, Lk]`, with `block = 1` and `blocks = order`: what `tsa::key_view` makes of a mask with holes. How many
            keys lie in the tensor up to and with this row of it; `ranks[:, -1]` are the lengths.
    """

    blocks: T | None
    block: int
    start: T | None
    lengths: T | None
    ranks: T | None = None

    @property
    def is_identity(self) -> bool:
        """Every row of the tensors is a key, in its own place."""
        return self.blocks is None and self.start is None and self.lengths is None

    @classmethod
    def ordered(cls, order: T | None, ranks: T | None) -> KvView:
        """By the results of `tsa::key_view`, or by None and None: every row of the tensors is a key."""
        return cls(order, 1, None, None, ranks)

    @property
    def order(self) -> tuple[T, T]:
        """(order, ranks), as operators of prefill take them; (None, None) without padding."""
        return self.blocks, self.ranks


IDENTITY = KvView(None, 1, None, None)


class Operands(NamedTuple):
    """What one attention reads, in the operators' form.

    Args:
        q: `[B, H, Lq, D]`, after RoPE; the last `Lq` of the positions.
        k: `[B, Hk, Lk, D]`, `H % Hk == 0`.
        v: `[B, Hk, Lk, Dv]`.
        key_mask: bool `[B, Lk]`, true: a real token; None: all.
        view: where keys lie, made from `key_mask` once a graph (`tsa::key_view`): prefill reads this, and not the mask.
        mask: what else hides or weighs keys, as data: bool, or numbers added to the logits, `[B or 1, H or 1, Lq or 1, Lk]`.
            Only decode policies read it.
        sinks: `[H]`, a logit without a value that joins each head's softmax. Only decode policies read it.
    """

    q: T
    k: T
    v: T
    key_mask: T | None = None
    view: KvView = IDENTITY
    mask: T | None = None
    sinks: T | None = None


class Rotation(NamedTuple):
    """How a model rotates queries and keys by their position (RoPE): pair `i` at position `p` by the angle `p * frequencies[i]`.

    Args:
        frequencies: one for each pair; the pairs are the first dims of a head, the others are not rotated.
        interleaved: pair `i` is dims `2 i` and `2 i + 1`; otherwise `i` and `i + len(frequencies)`.
        factor: by which rotated dims are multiplied besides.
    """

    frequencies: tuple[float, ...]
    interleaved: bool
    factor: float


class Tokens(NamedTuple):
    """Kept tokens of each list (a query head's, or a KV head's): what `tsa::select_tokens` returns.

    Args:
        indices: int32 `[B, G, Lk]`, ascending positions, -1 behind the last; `G` is `H` or `Hk`.
        counts: int32 `[B]`, kept tokens of the row, one number for all its lists.
        heavy_indices: int32 `[B, G, heavy]`, the list's heaviest tokens, ascending, -1 behind the last.
    """

    indices: T
    counts: T
    heavy_indices: T


class Keys(NamedTuple):
    """Kept keys of bidirectional attention: `Tokens` without the heaviest."""

    indices: T
    counts: T


class Pages(NamedTuple):
    """Kept pages of a decode step: what a page index chose for one query row.

    Args:
        indices: int32 `[B, Hk, N]`, page numbers in any order; entries behind the count are undefined.
        counts: int32 `[B, Hk]`, kept pages of the list.
    """

    indices: T
    counts: T


class CompletedPages(NamedTuple):
    """Kept pages, and what the others are completed by.

    Args:
        indices, list_counts: as in `Pages`, ascending.
        logits: float32 `[B, H, 1, P]`, by the mean keys.
        sums: `[N, Hk, P, Dv]`, of the pages' values.
        counts: int32 `[N, 1, P]`, keys of a page.
    """

    indices: T
    list_counts: T
    logits: T
    sums: T
    counts: T


class PageBitmap(NamedTuple):
    """Kept key blocks of each block of query rows (prefill).

    Args:
        bits: int64 `[B, H or Hk, row blocks, ceil(key blocks / 64)]`; bit `j % 64` of word `j // 64` is key block `j`.
    """

    bits: T


class Listed(NamedTuple):
    """Keys that a verify step chose among those before it; every key from `since` on is read besides.

    Args:
        indices: int32 `[B, Hk, N]`, ascending; behind `counts` they mean nothing.
        counts: int32 `[B, Hk]`.
        since: int32 `[B]`.
        begin: int32 `[B]`, where the running step's rows begin.
    """

    indices: T
    counts: T
    since: T
    begin: T


class Draws(NamedTuple):
    """No list: the keys are drawn as they are attended, at random.

    Args:
        seed: int64 `[1]` or `[B]`, another one for each layer.
        teams: int64 `[N, Hk, pages]` (common/teams.py), of which some are drawn; None: single keys are.
    """

    seed: T
    teams: T | None = None


Selection: TypeAlias = Tokens | Keys | Pages | CompletedPages | PageBitmap | Listed | Draws


class Strip(NamedTuple):
    """What every row reads beside its selection: the completion strip. All 0: nothing.

    Args:
        window: the row's own and preceding tokens.
        sinks: the first tokens of the sequence.
    """

    window: int = 0
    sinks: int = 0

    def reads(self, heavy_indices: T) -> bool:
        """Whether, with these heaviest tokens `[B, G, heavy]`, there is a strip at all."""
        return self.window > 0 or self.sinks > 0 or heavy_indices.shape[-1] > 0


class TokenRule(NamedTuple):
    """How tokens are selected (arXiv 2602.03216, section 3); the numbers of `tsa::select_tokens`, in its order.

    Args:
        coverage: share of the attention mass that may be dropped, in [0, 1).
        last_queries: how many queries score the keys; their tokens are kept. Operators and policies call it `window`.
        pool: width of the average pooling of scores, odd.
        min_tokens: kept tokens beside those, at least.
        heavy: heaviest tokens listed besides, for the strip.
    """

    coverage: float
    last_queries: int
    pool: int
    min_tokens: int
    heavy: int = 0


class KeyBlockRule(NamedTuple):
    """Which key blocks a block of query rows reads (after arXiv 2603.06199); numbers of `tsa::select_key_blocks`, in its order.

    Args:
        alpha: share of the heaviest block's mass that a block must reach, in [0, 1).
        pool: query rows whose mean is scored.
        window: own and preceding tokens that every row reads.
        sinks: first tokens, always read.
        last_dense: last rows, which read everything.
        share: "head", or "group": the heads of a KV head read what any of them keeps.
    """

    alpha: float
    pool: int
    window: int
    sinks: int
    last_dense: int
    share: str = "head"


class Attended(NamedTuple):
    """What every attend operator returns: a partial attention that `merge` can join with others over disjoint keys.

    Args:
        out: `[B, H, Lq, Dv]`, stored as `[B, Lq, H, Dv]`; zero in a row that read no key.
        lse: float32 `[B, H, Lq]`, natural log of the sum of exponentials; -inf in a row that read no key. Empty (`[0]`) where
            the caller said that it needs none.
    """

    out: T
    lse: T
