"""Cases of `tsa-compile bench diffusion`, what is measured of each, and its sums."""

from __future__ import annotations

import dataclasses

from tsa_compile.policies.remembered import Remembered
from tsa_compile.tools.diffusion.model import Sizes


@dataclasses.dataclass(frozen=True)
class DiffusionCase:
    """A block of a model of Llama-3.1-8B's shape, over a prefix; bf16 on a GPU."""

    batch: int
    prefix: int
    block: int = 32
    keys: int = 512
    steps: int = 32
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    layers: int = 32
    dense_layers: int = 2
    mlp: int = 14336
    vocabulary: int = 128_256

    @property
    def name(self) -> str:
        return f"B{self.batch} prefix {self.prefix // 1024}K k {self.keys}"

    @property
    def scale(self) -> float:
        return self.dim**-0.5

    @property
    def policy(self) -> Remembered:
        return Remembered("denoise_first", keys=self.keys, dense_layers=self.dense_layers)

    @property
    def sizes(self) -> Sizes:
        return Sizes(
            self.vocabulary, self.block, self.heads * self.dim, self.layers, self.heads, self.kv_heads, self.mlp, 500_000.0
        )


CASES = tuple(DiffusionCase(batch, prefix) for batch in (1, 4) for prefix in (16_384, 32_768, 65_536, 131_072))


@dataclasses.dataclass(frozen=True)
class DiffusionRow:
    """Milliseconds of one case.

    Args:
        attention: of one layer's call: "dense", "select", "first" (dense and select), "later".
        model: of one call of the whole model: "dense", "first", "later"; empty: not measured.
        error: relative error of a later step given its list, against float64.
        held: mass of the lists over that of the best keys, in float32.
    """

    case: DiffusionCase
    attention: dict[str, float]
    model: dict[str, float]
    error: float
    held: float

    @property
    def later_over_dense(self) -> float:
        """How many times cheaper the attention of a later step is."""
        return self.attention["dense"] / self.attention["later"]

    @property
    def block_attention(self) -> tuple[float, float]:
        """Milliseconds of a block's attention in all steps and layers: (dense, remembered)."""
        c, a = self.case, self.attention
        remembered = (c.layers - c.dense_layers) * (a["first"] + (c.steps - 1) * a["later"])
        return c.layers * c.steps * a["dense"], remembered + c.dense_layers * c.steps * a["dense"]

    @property
    def block_model(self) -> tuple[float, float] | None:
        """Milliseconds of a whole block, the call that commits it included: (dense, remembered); None: not measured."""
        if not self.model:
            return None
        steps, m = self.case.steps, self.model
        return (steps + 1) * m["dense"], m["first"] + (steps - 1) * m["later"] + m["dense"]


def told(row: DiffusionRow) -> list[str]:
    """Lines of text."""
    a, (dense, remembered) = row.attention, row.block_attention
    lines = [
        f"{row.case.name}: error {row.error:.1e}, lists hold {row.held:.4f} of the best keys' mass",
        "  attention of a layer, us: " + ", ".join(f"{name} {1000 * ms:.1f}" for name, ms in a.items()),
        f"  later steps {row.later_over_dense:.2f}x cheaper; a block's attention {dense:.2f} -> {remembered:.2f} ms, "
        f"{dense / remembered:.2f}x",
    ]
    if row.block_model is not None:
        dense, remembered = row.block_model
        calls = ", ".join(f"{name} {ms:.2f}" for name, ms in row.model.items())
        lines.append(f"  model, ms a call: {calls}; a block {dense:.1f} -> {remembered:.1f} ms, {dense / remembered:.2f}x")
    return lines
