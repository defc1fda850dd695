"""The attention shapes that are timed, declared once."""

from __future__ import annotations

import dataclasses

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
KEEPS = (0.25, 0.5, 0.7, 0.9)


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """Causal prefill attention in bf16; `keep` is the share of the tokens that is kept."""

    name: str
    length: int
    keep: float = 0.5
    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128

    @property
    def flops(self) -> float:
        """Of dense causal attention: two products, half of the square."""
        return 2.0 * self.batch * self.heads * self.length**2 * self.dim


CASES: tuple[AttentionCase, ...] = (
    *(AttentionCase(f"L{n // 1024}K keep {p}", n, p) for n in LENGTHS for p in KEEPS if p < 0.6 or n <= 32768),
    AttentionCase("L128K keep 0.2", 131072, 0.2),
    AttentionCase("batch 4", 32768, batch=4),
    AttentionCase("head dim 64", 131072, dim=64),
    AttentionCase("head dim 256", 65536, dim=256),
    AttentionCase("no groups", 65536, heads=8),
    AttentionCase("groups of 8", 131072, kv_heads=4),
)


def select_cases(patterns: str | None) -> list[AttentionCase]:
    """The cases whose name contains a pattern; several, comma separated, give the order.

    Raises:
        ValueError: a pattern that no case matches.
    """
    found: dict[str, AttentionCase] = {}
    for pattern in (patterns or "").split(","):
        cases = {c.name: c for c in CASES if pattern.strip() in c.name}
        if not cases:
            raise ValueError(f"no case matches {pattern!r}; the cases are {[c.name for c in CASES]}")
        found |= {name: c for name, c in cases.items() if name not in found}
    return list(found.values())
