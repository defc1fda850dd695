"""What projects queries and keys of one attention before their rotation, a submodule of it: it moves and is saved with it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from tsa_compile.kernels.types import Rotation

NAME = "tsa_index"  # of the submodule
_NUMBERS = itertools.count()


class HeadIndex(nn.Module):
    """The learned index of some query heads of one attention (RTPurbo, arXiv 2605.16928). It is read, and never called.

    Args:
        heads: the query heads, each with a list of its own; at least one.
        group: query heads of a KV head.
        query, key: `[len(heads), r, D]`, what projects a head's queries and its KV head's keys; scores are plain products.
        rotation: what is undone before.

    Raises:
        ValueError: shapes that do not fit each other.
    """

    query: torch.Tensor
    key: torch.Tensor
    frequencies: torch.Tensor

    def __init__(self, heads: tuple[int, ...], group: int, query: torch.Tensor, key: torch.Tensor, rotation: Rotation) -> None:
        super().__init__()
        if not heads or query.dim() != 3 or query.shape != key.shape or query.shape[0] != len(heads):
            shapes = f"{tuple(query.shape)} and {tuple(key.shape)}"
            raise ValueError(f"weights of an index must be [{len(heads)}, r, head dim], at least one head, got {shapes}")
        if not 1 <= 2 * len(rotation.frequencies) <= query.shape[2]:
            raise ValueError(f"{len(rotation.frequencies)} pairs are rotated, of a head dim of {query.shape[2]}")
        self.heads, self.group = tuple(heads), group
        self.owners = tuple(h // group for h in heads)
        self.interleaved, self.factor = rotation.interleaved, rotation.factor
        self.state_name = f"projected_keys {next(_NUMBERS)}"  # of what a cache keeps: of these weights, and no others
        self.query = nn.Parameter(query.detach().clone().contiguous(), requires_grad=False)
        self.key = nn.Parameter(key.detach().clone().contiguous(), requires_grad=False)
        frequencies = torch.tensor(rotation.frequencies, dtype=torch.float32, device=query.device)
        self.register_buffer("frequencies", frequencies)

    @property
    def rotation(self) -> Rotation:
        return Rotation(tuple(self.frequencies.tolist()), self.interleaved, self.factor)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> HeadIndex:
        """`.to()` and the like; the frequencies stay float32: in half precision they would be those of another rotation."""
        frequencies = self.frequencies
        super()._apply(fn, recurse)
        self.frequencies = frequencies.to(self.frequencies.device)
        return self


def indexes(model: nn.Module) -> Iterator[tuple[str, HeadIndex]]:
    """(path of the attention, its index) of each that a model has."""
    for path, module in model.named_modules():
        found: Any = getattr(module, NAME, None)
        if isinstance(found, HeadIndex):
            yield path, found
