"""The rules under test for prefill: which key blocks a block of query rows reads, by estimates of their mass.

Each rule turns a layer into `levels`: one number for each (head, row block, key block), larger for what matters more. A threshold
on them makes the list, so that rules can be compared at equal numbers of pairs (`emulate_fit`).
"""

from __future__ import annotations

import dataclasses

import torch

from tsa_compile.kernels.compose_reference import select_tokens_reference
from tsa_compile.kernels.types import Operands, TokenRule
from tsa_compile.tools.evaluate.emulate_attention import CHUNK, Summaries
from tsa_compile.tools.evaluate.emulate_model import Layer

Tensor = torch.Tensor
CHOICES = {
    "masses": ("means", "exact"),
    "normal": ("row", "tile"),
    "reduce": ("mean", "max"),
    "share": ("head", "union", "group"),
    "select": ("alpha", "mass", "top"),
}


@dataclasses.dataclass(frozen=True)
class BlockRule:
    """Blocks of query rows read key blocks; all sizes in tokens.

    Args:
        rows, keys: size of a row block and of a key block.
        masses: of a key block for a query: from its mean keys ("means"), or its true mass ("exact": no kernel can, a bound).
        sub: keys of one mean; None: one mean a key block.
        rounded: the means are rounded to bfloat16.
        pool: query rows averaged into one before scoring. stride: every n-th (pooled) row scores.
        normal: a softmax a row ("row"), or exponentials against the largest of the row block ("tile", as FlashPrefill v2 does).
        reduce: "mean" or "max" over the rows.
        share: lists of each query head, the union of the group's lists, or one list by the group's mean masses.
        select: "alpha": the level is the mass over the largest one; "mass": 1 - mass of the heavier blocks (a threshold 1 - p is
            top-p); "top": minus the rank, so a threshold is a fixed number of blocks.
        coarse: blocks of so many keys are judged first; those below an eighth of the threshold are not looked at again.
        window: keys before the row block that it always reads. sinks: first keys that every row reads; whole blocks both.
        last_dense: last rows that read everything.
        coverage: tokens that every row reads beside its blocks, chosen by the last rows as `TokenSparse` does; None: none.
        completion: keys a mean covers that stand for what is left out; 0: nothing does.
        dense_layers: layers that read everything.
    """

    rows: int = 128
    keys: int = 64
    masses: str = "means"
    sub: int | None = None
    rounded: bool = False
    pool: int = 1
    stride: int = 1
    normal: str = "row"
    reduce: str = "mean"
    share: str = "head"
    select: str = "alpha"
    coarse: int | None = None
    window: int = 256
    sinks: int = 4
    last_dense: int = 128
    coverage: float | None = None
    completion: int = 0
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field, known in CHOICES.items():
            if getattr(self, field) not in known:
                raise ValueError(f"BlockRule.{field} must be one of {known}, got {getattr(self, field)!r}")
        if CHUNK % self.rows or self.rows % (self.pool * self.stride):
            raise ValueError(f"rows must divide {CHUNK} and hold whole pools and strides, got {self}")
        if self.keys % (self.sub or self.keys) or (self.completion and self.keys % self.completion):
            raise ValueError(f"keys must hold whole parts (sub, completion), got {self}")
        if self.coarse is not None and self.coarse % self.keys:
            raise ValueError(f"coarse must be a multiple of keys, got {self.coarse} and {self.keys}")

    def before(self, length: int, device: torch.device) -> Tensor:
        """bool [row blocks, key blocks]: the key block ends where the row block begins, or earlier."""
        first, block = self._grid(length, device)
        return (block + 1) * self.keys <= first

    def forced(self, length: int, device: torch.device) -> Tensor:
        """bool [row blocks, key blocks]: read whatever the masses are; later blocks count as read too."""
        first, block = self._grid(length, device)
        near = (block + 1) * self.keys > first - self.window
        return near | (block * self.keys < self.sinks) | (first + self.rows > length - self.last_dense)

    def _grid(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """First token of each row block [row blocks, 1]; key block numbers [1, key blocks]."""
        first = torch.arange(0, length, self.rows, device=device)[:, None]
        return first, torch.arange(-(-length // self.keys), device=device)[None]

    def tokens(self, layer: Layer) -> Tensor | None:
        """bool [H, L]: tokens that every row reads."""
        if self.coverage is None:
            return None
        k, rule = layer.k[None], TokenRule(self.coverage, last_queries=128, pool=7, min_tokens=64)
        chosen = select_tokens_reference(Operands(layer.q[None], k, None), layer.scale, rule).indices[0]
        kept = torch.zeros(layer.q.shape[0], k.shape[2] + 1, dtype=torch.bool, device=k.device)
        return kept.scatter_(1, chosen.long().where(chosen >= 0, k.shape[2]), True)[:, :-1]


class BlockMask:
    """A rule's lists for one layer, `keep` [H, row blocks, key blocks], as a mask."""

    def __init__(self, rule: BlockRule, layer: Layer, keep: Tensor, tokens: Tensor | None) -> None:
        self._rule, self._layer, self._tokens = rule, layer, tokens
        length = layer.k.shape[1]
        self._keep = keep | rule.forced(length, keep.device)
        self._left_out = ~self._keep & rule.before(length, keep.device)

    def hidden(self, group: int, start: int, end: int) -> Tensor:
        keep = self._rows(self._keep, group, start, end)
        shape = *keep.shape[:2], self._rule.rows, keep.shape[2], self._rule.keys
        hidden = (~keep)[:, :, None, :, None].expand(shape).reshape(shape[0], shape[1] * shape[2], -1)[:, : end - start, :end]
        if self._tokens is not None:
            hidden = hidden & ~self._tokens[self._heads(group), None, :end]
        return hidden

    def summaries(self, group: int, start: int, end: int) -> Summaries | None:
        page = self._rule.completion
        if not page:
            return None
        count = self._layer.k.shape[1] // page
        left_out = self._rows(self._left_out, group, start, end).repeat_interleave(self._rule.keys // page, 2)[:, :, :count]
        count = left_out.shape[2]
        keys, values = (
            x[group, : count * page].float().unflatten(0, (count, page)).mean(1) for x in (self._layer.k, self._layer.v)
        )
        added = torch.full(left_out.shape, -torch.inf, device=keys.device).masked_fill_(left_out, float(torch.tensor(page).log()))
        return keys, values, added.repeat_interleave(self._rule.rows, 1)[:, : end - start]

    def _heads(self, group: int) -> slice:
        return slice(group * self._layer.group, (group + 1) * self._layer.group)

    def _rows(self, blocks: Tensor, group: int, start: int, end: int) -> Tensor:
        """The part of [H, row blocks, key blocks] that covers these rows, up to the key block of their end."""
        rows = slice(start // self._rule.rows, -(-end // self._rule.rows))
        return blocks[self._heads(group), rows, : -(-end // self._rule.keys)]


class TokenMask:
    """`TokenSparse` with completion (arXiv 2602.03216): kept tokens read kept tokens; every row reads a strip."""

    def __init__(self, layer: Layer, coverage: float, window: int = 256, sinks: int = 4, heavy: int = 256) -> None:
        x, rule = Operands(layer.q[None], layer.k[None], None), TokenRule(coverage, 128, 7, 1024, heavy)
        kept, _, heaviest = select_tokens_reference(x, layer.scale, rule)
        self._kept, self._heavy = (self._flags(layer, x[0]) for x in (kept, heaviest))
        self._heavy[:, :sinks] = True
        self._group, self._window = layer.group, window

    @staticmethod
    def _flags(layer: Layer, chosen: Tensor) -> Tensor:
        length = layer.k.shape[1]
        flags = torch.zeros(layer.q.shape[0], length + 1, dtype=torch.bool, device=chosen.device)
        return flags.scatter_(1, chosen.long().where(chosen >= 0, length), True)[:, :-1]

    def hidden(self, group: int, start: int, end: int) -> Tensor:
        of = slice(group * self._group, (group + 1) * self._group)
        kept, heavy = self._kept[of, :end], self._heavy[of, :end]
        row = torch.arange(start, end, device=kept.device)[:, None]
        far = torch.arange(end, device=kept.device)[None] <= row - self._window
        return ~(kept[:, start:, None] & kept[:, None]) & ~heavy[:, None] & far

    def summaries(self, group: int, start: int, end: int) -> Summaries | None:
        return None
