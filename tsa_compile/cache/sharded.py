"""Rows of one attention layer of which each rank of a process group keeps its pages (`kernels/common/spread.py`).

What is asked of the layer is said of the whole sequence; what its buffers hold are this rank's rows. A call with many rows sees
every key: those of the past are fetched from the other ranks, for as long as the layer attends. A decode step sees this rank's
buffers, and a policy that merges what the ranks find.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import torch

from tsa_compile.cache.buffered import Pair, joined
from tsa_compile.cache.part_methods import PartMethods
from tsa_compile.cache.route_choice import RouteRule, decide
from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.common.group import rank_and_size
from tsa_compile.kernels.common.spread import positions, rows_held
from tsa_compile.kernels.routed import at_hand


class Shard(NamedTuple):
    """A rank's part of every sequence.

    Args:
        group: name of the process group.
        rank: of this process in it.
        ranks: how many it has.
        rule: by which the other parts may come here, too; None: never.
    """

    group: str
    rank: int
    ranks: int
    rule: RouteRule | None = None

    @classmethod
    def of(cls, group: str, rule: RouteRule | None = None) -> Shard:
        """This process' part.

        Raises:
            GroupError: this process is in no such group.
        """
        return cls(group, *rank_and_size(group), rule)

    def __str__(self) -> str:
        return f"spread over group {self.group!r}"

    def held(self, length: int) -> int:
        """Rows that this rank holds of so many."""
        return rows_held(length, self.rank, self.ranks)

    def columns(self, mask: torch.Tensor, rows: int) -> torch.Tensor:
        """Of `mask` `[B, n]` over the sequence what stands for the first `rows` rows of this rank, as far as it goes."""
        place = positions(rows, self.rank, self.ranks, mask.device)
        return mask[:, place[place < mask.shape[1]]]

    def fetch(self, rows: torch.Tensor, length: int) -> torch.Tensor:
        """All `length` rows `[B, Hk, length, D]` of a sequence; `rows` are this rank's."""
        if self.ranks == 1:
            return rows
        whole: torch.Tensor = torch.ops.tsa.gather_rows.default(rows, length, self.group)
        return whole


class SpreadMethods(PartMethods):
    """What a layer of transformers that keeps all rows does otherwise where they are spread over ranks.

    Attributes:
        kept: this rank's part by the plan; shard: what it holds, which is everything once the others were fetched.
        way: how steps reach the other ranks' rows, "route" or "fetch" (`route_choice.py`); None: not decided, they are routed.
    """

    def __init__(self, shard: Shard, **kwargs: Any) -> None:
        self.shard = self.kept = shard
        self.where = f"are {shard}"
        self.way: str | None = None
        super().__init__(**kwargs)

    @property
    def keeping(self) -> Shard:
        return self.kept

    def clear(self) -> None:
        super().clear()
        self.shard, self.way = self.kept, None

    def take(self, way: str) -> None:
        """What was decided; all ranks call it."""
        self.way = way
        if way == "fetch":
            rows = [self.shard.fetch(x, self.total) for x in self.views()]
            self.shard = self.kept._replace(rank=0, ranks=1)
            self._place(rows[0], rows[1])

    def mode(self) -> str | None:
        return self.way

    @contextlib.contextmanager
    def around_step(self, layers: Sequence[Any]) -> Iterator[bool]:
        decide(layers, self.settled().keys.shape[0], self.shard.ranks)
        with at_hand() if self.way == "fetch" else contextlib.nullcontext():
            yield False

    def _store(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keep this rank's of the new rows."""
        self._undecided()
        begin, end = self.total, self.total + keys.shape[-2]
        place = positions(self.shard.held(end), self.shard.rank, self.shard.ranks, keys.device)[self.length :] - begin
        self.total = end
        self._write(keys[:, :, place], values[:, :, place])

    def remove_last(self, rows: int) -> None:
        self.settle()
        self._undecided()
        total = max(0, self.total - rows)
        super().remove_last(self.length - self.shard.held(total))
        self.total = total

    def advance(self, rows: int) -> None:
        total = self.total + rows
        super().advance(self.shard.held(total) - self.length)
        self.total = total

    def own_mask(self, mask: torch.Tensor | None, new: int) -> torch.Tensor:
        """A row that another rank holds has no place here: it is written behind the last row, where nothing is seen."""
        rows = self.shard.held(self.total + new)
        if mask is None:
            keys = self.settled().keys
            return torch.ones(keys.shape[0], rows, dtype=torch.int64, device=keys.device)
        return self.shard.columns(mask, rows)

    def as_plain(self) -> Any:
        """A layer of transformers with every row; all ranks call it."""
        layer = self.plain()
        if self.has_rows():
            rows = [self.shard.fetch(t, self.total) for t in self.views()]
            layer.lazy_initialization(*rows)
            layer.keys, layer.values = rows
        return layer

    def _undecided(self) -> None:
        """Other rows, another decision; what was fetched stays."""
        self.way = None if self.way == "route" else self.way

    def __reduce__(self) -> NoReturn:
        self._refuse("pickles: the other ranks' rows are not here")

    def _joined(self, keys: torch.Tensor, values: torch.Tensor) -> Pair:
        if self.total == 0:
            return keys, values
        assert self.buffers is not None
        past = [self.shard.fetch(t[:, :, : self.length], self.total) for t in self.buffers[:2]]
        return joined((past[0], past[1]), (keys, values))

    def _padding(self) -> torch.Tensor | None:
        mask = super()._padding()
        return None if mask is None else self.shard.columns(mask, self.shard.held(self.total))
