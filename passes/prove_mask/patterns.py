"""Tensors whose values are known when a graph is compiled: the few patterns in them that a mask may be made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeAlias

import torch
import torch.fx as fx

_LARGEST = 1 << 26  # entries
Scalar: TypeAlias = bool | int | float


@dataclasses.dataclass(frozen=True)
class Uniform:
    """The same everywhere."""

    value: Scalar


@dataclasses.dataclass(frozen=True)
class Progression:
    """Integers `start + step * i` along `dim`, the only one longer than 1."""

    dim: int
    start: int
    step: int


@dataclasses.dataclass(frozen=True)
class Band:
    """`inside` where `first <= column - row <= last` (no lower bound if `first` is None), else `outside`.

    `dims` are the row's and the column's, the only ones longer than 1.
    """

    dims: tuple[int, int]
    inside: Scalar
    outside: Scalar
    first: int | None
    last: int


@dataclasses.dataclass(frozen=True)
class Unchanged:
    """Its very numbers, whatever they are: nothing else is found in a tensor that was written to, or is another one."""


Pattern: TypeAlias = Uniform | Progression | Band | Unchanged


class Constants:
    """Known tensors by node; each is read once, when a proof first asks for it (on a GPU this waits for the device)."""

    def __init__(self, tensors: Mapping[fx.Node, torch.Tensor]) -> None:
        self._tensors = tensors
        self.patterns: dict[fx.Node, Pattern | None] = {}  # of those that were read

    def __contains__(self, node: fx.Node) -> bool:
        return node in self._tensors

    def pattern(self, node: fx.Node) -> Pattern | None:
        if node not in self.patterns:
            self.patterns[node] = pattern_of(self._tensors[node])
        return self.patterns[node]


def pattern_of(tensor: torch.Tensor) -> Pattern | None:
    """What `tensor` is, checked entry by entry; None: nothing that is known, or too large to look at."""
    data = tensor.detach()
    if data.numel() == 0 or data.numel() > _LARGEST or data.dtype.is_complex or data.is_meta:
        return None
    first = data.flatten()[0]
    if bool((data == first).all()):
        return Uniform(first.item())
    long_dims = [d for d in range(data.dim()) if data.shape[d] > 1]
    if len(long_dims) == 1:
        return _progression(data.flatten(), long_dims[0])
    if len(long_dims) == 2:
        return _band(data.reshape([data.shape[d] for d in long_dims]), (long_dims[0], long_dims[1]))
    return None


def _progression(data: torch.Tensor, dim: int) -> Progression | None:
    if data.dtype == torch.bool or data.dtype.is_floating_point:
        return None
    start, step = int(data[0]), int(data[1]) - int(data[0])
    expected = start + step * torch.arange(data.numel(), device=data.device)
    return Progression(dim, start, step) if bool((data == expected).all()) else None


def _band(data: torch.Tensor, dims: tuple[int, int]) -> Band | None:
    outside = data[0, -1]
    within = data != outside
    inside = data[within][0]  # not all entries are equal
    if not bool((data[within] == inside).all()):
        return None
    rows, columns = (torch.arange(n, device=data.device) for n in data.shape)
    offset = columns - rows[:, None]
    last = int(offset[within].max())
    first = None if bool(within[-1, 0]) else int(offset[within].min())
    band = offset <= last if first is None else (offset <= last) & (offset >= first)
    return Band(dims, inside.item(), outside.item(), first, last) if bool((within == band).all()) else None
