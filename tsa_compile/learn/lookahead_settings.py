"""How a lookahead index is trained."""

from __future__ import annotations

import dataclasses

from tsa_compile.policies.base import check_int


@dataclasses.dataclass(frozen=True)
class LookaheadTraining:
    """How a lookahead index is trained; the numbers are the published ones, where there are (FlashMemory, arXiv 2606.09079).

    Args:
        rank: numbers of the code that queries are projected to; None: half of the query heads' numbers together, as published.
        heads: of the index, a multiple of the KV heads; None: as many as there are query heads (published: 128).
        top_p: of the attention to pages that may leave the device, in (0, 1): the fewest pages that hold it are needed.
        agree: layers by which a page must be needed at a token; None: a seventh of them, rounded up (published: 3 of 21).
        rows: queries of a text that an update is made on, drawn at random behind its first quarter.
        epochs: times that each text is read; 0: the first weights, which are random, stay.
        reuse: updates for each reading, each on other negatives (published: 1).
        negatives: pages that are not needed for each one that is, drawn at random.
        gamma: of the focal loss.
        lr: of AdamW, after a warm-up of a tenth of the updates, falling to 0 as a cosine; weight decay 0.01, gradients of norm 1
            at most.
        seed: of all that is random.

    Raises:
        ValueError: a field is outside its range; the message names it.
    """

    rank: int | None = None
    heads: int | None = None
    top_p: float = 0.6
    agree: int | None = None
    rows: int = 64
    epochs: int = 3
    reuse: int = 1
    negatives: int = 3
    gamma: float = 2.0
    lr: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("rows", 1), ("epochs", 0), ("reuse", 1), ("negatives", 1)):
            check_int(self, name, low)
        for name in ("rank", "heads", "agree"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"LookaheadTraining.{name} must be an int >= 1, or None, got {value!r}")
        if not 0 < self.top_p < 1 or not self.gamma >= 0 or not self.lr > 0:
            numbers = f"{self.top_p}, {self.gamma}, {self.lr}"
            raise ValueError(f"LookaheadTraining.top_p must be in (0, 1), gamma at least 0 and lr above 0, got {numbers}")
