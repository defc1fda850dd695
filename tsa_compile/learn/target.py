"""What a calibration must reach: `kl<=X`, `sparsity>=X`, `pairs<=X` or `pages<=X`."""

from __future__ import annotations

import dataclasses
import math
import re

_FORM = re.compile(r"\s*(kl\s*<=|sparsity\s*>=|pairs\s*<=|pages\s*<=)\s*([0-9.eE+-]+)\s*")


@dataclasses.dataclass(frozen=True)
class Target:
    """A bound on the loss (`kl`: KL(dense || sparse) in nats, at most), on the sparsity (share of tokens that are not kept, at
    least), on the pairs (share of the causal query-key pairs that are read, at most) or on the pages (share of those of the cache
    that a decode step reads, at most)."""

    quantity: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Target:
        """The target that `text` says.

        Raises:
            ValueError: it is neither "kl<=X" with X > 0 nor "sparsity>=X", "pairs<=X" or "pages<=X" with X in (0, 1).
        """
        match = _FORM.fullmatch(text) if isinstance(text, str) else None
        try:
            target = cls(match[1].split("<")[0].split(">")[0].strip(), float(match[2])) if match else None
        except ValueError:
            target = None
        limit = math.inf if target and target.quantity == "kl" else 1.0
        if target is None or not 0 < target.bound < limit:
            shares = '"sparsity>=X", "pairs<=X" or "pages<=X"'
            raise ValueError(f'target must be "kl<=X" with X > 0, or {shares} with X in (0, 1), got {text!r}')
        return target

    def met_by(self, kl: float, sparsity: float) -> bool:
        return kl <= self.bound if self.quantity == "kl" else sparsity >= self.bound

    def __str__(self) -> str:
        return f"{self.quantity}{'>=' if self.quantity == 'sparsity' else '<='}{self.bound:g}"
