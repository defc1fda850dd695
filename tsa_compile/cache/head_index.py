"""What projects queries and keys of one attention before their rotation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from tsa_compile.cache.learned_index import LearnedIndex, learned
from tsa_compile.kernels.types import Rotation

_NUMBERS = itertools.count()


class HeadIndex(LearnedIndex):
    """The learned index of some query heads of one attention (RTPurbo, arXiv 2605.16928).

    Args:
        heads: the query heads, each with a list of its own; at least one.
        group: query heads of a KV head.
        query, key: `[len(heads), r, D]`, what projects a head's queries and its KV head's keys; scores are plain products.
        rotation: what is undone before.

    Raises:
        ValueError: shapes that do not fit each other.
    """

    kind = "heads"
    tensors = ("query", "key")
    query: torch.Tensor
    key: torch.Tensor

    def __init__(self, heads: tuple[int, ...], group: int, query: torch.Tensor, key: torch.Tensor, rotation: Rotation) -> None:
        if not heads or query.dim() != 3 or query.shape != key.shape or query.shape[0] != len(heads):
            shapes = f"{tuple(query.shape)} and {tuple(key.shape)}"
            raise ValueError(f"weights of an index must be [{len(heads)}, r, head dim], at least one head, got {shapes}")
        if not 1 <= 2 * len(rotation.frequencies) <= query.shape[2]:
            raise ValueError(f"{len(rotation.frequencies)} pairs are rotated, of a head dim of {query.shape[2]}")
        super().__init__(rotation, {"query": query, "key": key})
        self.heads, self.group = tuple(heads), group
        self.owners = tuple(h // group for h in heads)
        self.state_name = f"projected_keys {next(_NUMBERS)}"  # of what a cache keeps: of these weights, and no others

    def told(self) -> dict[str, Any]:
        return {"heads": self.heads, "group": self.group}

    @classmethod
    def rebuilt(cls, told: Mapping[str, Any], weights: Mapping[str, torch.Tensor], rotation: Rotation) -> HeadIndex:
        return cls(tuple(told["heads"]), int(told["group"]), weights["query"], weights["key"], rotation)


def indexes(model: nn.Module) -> Iterator[tuple[str, HeadIndex]]:
    """(path of the attention, its index) of each that a model has."""
    for path, _, index in learned(model):
        if isinstance(index, HeadIndex):
            yield path, index
