"""What is done to the scores of an attention that is written out: what `score_steps` collects."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.fx as fx

from tsa_compile.passes.facts.names import number_of
from tsa_compile.passes.prove_mask.source import MaskSource

SOFTCAP = "softcap: scores go through tanh"


@dataclasses.dataclass
class Scores:
    """What lies between the product of q and k and the softmax, collected from the softmax backwards.

    Args:
        scale: of the product; None: it is not a positive constant.
        factor: of all that was passed on the way; masks further back are scaled by it.
        softcap: what tanh was multiplied by; 0: there was none.
        sinks: the column beside those of the keys.
    """

    scale: float | None = 1.0
    factor: float = 1.0
    sources: list[MaskSource] = dataclasses.field(default_factory=list)
    obstacle: str | None = None
    softcap: float = 0.0
    sinks: fx.Node | None = None

    def scaled(self, by: Any) -> None:
        by = number_of(by)
        if isinstance(by, (int, float)) and by > 0:
            self.factor *= by
            self.scale = None if self.scale is None else self.scale * by
        else:
            self.scale = None

    def capped(self) -> None:
        """`softcap * tanh(x)`, read at tanh; what masks lie further back would be capped too."""
        if self.softcap or self.scale is None:
            self.obstacle = f"{SOFTCAP}, {'twice' if self.softcap else 'times a number that is no constant'}"
        else:
            self.softcap, self.scale = self.scale, 1.0

    @property
    def product_scale(self) -> float | None:
        """The scale of the scores that are capped, `softcap * tanh(scale * q k^T / softcap)`, or of the only ones."""
        return self.scale if self.scale is None or not self.softcap else self.scale * self.softcap

    def add(self, source: MaskSource) -> None:
        self.sources.append(source)
        if self.softcap:
            self.obstacle = f"{SOFTCAP} behind their mask"
