"""What a learned index is: weights that are a submodule of the attention that they are for, and move and are saved with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from tsa_compile.kernels.types import Rotation

NAME = "tsa_index"  # of the submodule


class LearnedIndex(nn.Module):
    """Base of the kinds. It is read, and never called.

    Attributes:
        kind: its name in files.
        tensors: names of what it has learned; beside these `frequencies`, float32, of the rotation.
    """

    kind: ClassVar[str]
    tensors: ClassVar[tuple[str, ...]]
    frequencies: torch.Tensor

    def __init__(self, rotation: Rotation, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.interleaved, self.factor = rotation.interleaved, rotation.factor
        for name, x in weights.items():
            self.register_parameter(name, nn.Parameter(x.detach().clone().contiguous(), requires_grad=False))
        device = next(iter(weights.values())).device
        self.register_buffer("frequencies", torch.tensor(rotation.frequencies, dtype=torch.float32, device=device))

    def told(self) -> dict[str, Any]:
        """What `rebuilt` needs beside tensors and rotation; JSON values."""
        raise NotImplementedError

    @classmethod
    def rebuilt(cls, told: Mapping[str, Any], weights: Mapping[str, torch.Tensor], rotation: Rotation) -> LearnedIndex:
        raise NotImplementedError

    @property
    def rotation(self) -> Rotation:
        return Rotation(tuple(self.frequencies.tolist()), self.interleaved, self.factor)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LearnedIndex:
        """`.to()` and the like; the frequencies stay float32: in half precision they would be those of another rotation."""
        frequencies = self.frequencies
        super()._apply(fn, recurse)
        self.frequencies = frequencies.to(self.frequencies.device)
        return self


def learned(model: nn.Module) -> Iterator[tuple[str, nn.Module, LearnedIndex]]:
    """(path of the attention, the attention, its index) of each that a model has."""
    for path, module in model.named_modules():
        found: Any = getattr(module, NAME, None)
        if isinstance(found, LearnedIndex):
            yield path, module, found
