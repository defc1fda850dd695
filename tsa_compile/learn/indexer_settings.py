"""How an index is trained, and its learning rate."""

from __future__ import annotations

import dataclasses
import math

from tsa_compile.learn.indexer_start import INITS
from tsa_compile.policies.base import check_int

WARM_UP = 0.1  # of the updates


@dataclasses.dataclass(frozen=True)
class Training:
    """How an index is trained.

    Args:
        width: numbers of a projection; None: an eighth of the head dim (published: 16 of 128).
        mass: of a head's attention that the teacher is cut to, and that steps read by the index, in (0, 1).
        init: "balanced" or "svd", see `indexer_start.py`.
        start_texts: texts whose queries and keys the first weights are made of.
        epochs: times that each text is read; 0: the first weights stay.
        rows: query rows of a text that an update is made on, drawn at random behind its first quarter.
        reuse: updates for each reading of a text, each on other rows.
        lr: of AdamW, after a warm-up of a tenth of the updates, falling to 0 as a cosine; weight decay 0.01.
        seed: of the rows.

    Raises:
        ValueError: a field is outside its range; the message names it.
    """

    width: int | None = None
    mass: float = 0.9
    init: str = "balanced"
    start_texts: int = 4
    epochs: int = 1
    rows: int = 256
    reuse: int = 4
    lr: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("start_texts", 1), ("epochs", 0), ("rows", 1), ("reuse", 1)):
            check_int(self, name, low)
        if self.width is not None and (type(self.width) is not int or self.width < 1):
            raise ValueError(f"Training.width must be an int >= 1, or None, got {self.width!r}")
        if not 0 < self.mass < 1 or self.init not in INITS or not self.lr > 0:
            raise ValueError(
                f"Training.mass must be in (0, 1), init one of {INITS} and lr above 0, got {self.mass}, {self.init!r}, {self.lr}"
            )


def schedule(done: float) -> float:
    """Share of the learning rate: a rise, then a cosine down to 0."""
    return done / WARM_UP if done < WARM_UP else 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))
