"""Cases of `tsa-compile bench decode`: sizes, the bytes that each form must read, and the buffers that calls go round over."""

from __future__ import annotations

import dataclasses
import math

import torch

from tsa_compile.kernels.common.pages import PAGE, pages_of
from tsa_compile.kernels.common.shares import share_bits
from tsa_compile.kernels.select.top_pages.budget import budget

Tensor = torch.Tensor
ROUND_BYTES = 1_000_000_000  # read in a round at least, so that L2 holds nothing of the next call's
SINKS, RECENT = 1, 3


@dataclasses.dataclass(frozen=True)
class DecodeCase:
    """One decode step: `rows` query rows over `length` keys; bf16."""

    batch: int
    length: int
    rows: int = 1
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    keep: float = 0.05

    @property
    def name(self) -> str:
        rows = "" if self.rows == 1 else f" rows {self.rows}"
        return f"B{self.batch} L{self.length // 1024}K{rows}"

    @property
    def scale(self) -> float:
        return self.dim**-0.5

    @property
    def kv_bytes(self) -> int:
        """Keys and values, bf16."""
        return 2 * 2 * self.batch * self.kv_heads * self.length * self.dim

    @property
    def index_bytes(self) -> int:
        """Page sums, bf16."""
        return 2 * self.batch * self.kv_heads * pages_of(self.length) * self.dim

    @property
    def kept_pages(self) -> int:
        return max(SINKS + RECENT, budget(pages_of(self.length), share_bits(self.keep), (0,)))

    @property
    def kept_bytes(self) -> int:
        """Keys and values of the kept pages."""
        return 2 * 2 * self.batch * self.kv_heads * min(self.kept_pages * PAGE, self.length) * self.dim

    @property
    def sets(self) -> int:
        """Buffers to go round over, by the form that reads least: the kept pages alone."""
        return max(1, math.ceil(ROUND_BYTES / self.kept_bytes)) if self.rows == 1 else math.ceil(ROUND_BYTES / self.kv_bytes)

    def floors(self, copy_tbps: float) -> dict[str, float]:
        """Milliseconds that reading takes by form, at a rate in 10**12 bytes a second."""
        read = {"exact": self.kv_bytes}
        if self.rows == 1:
            read |= {"pages": self.index_bytes + self.kept_bytes, "score": self.index_bytes, "attend": self.kept_bytes}
            read |= {"sampled, prop": self.kv_bytes // 2, "sampled, flash": self.kv_bytes // 2}  # all keys, and few values
            read["sampled, teams"] = self.kv_bytes // 8  # four keys of a page, and few teams
        return {name: n / copy_tbps / 1e9 for name, n in read.items()}


CASES = (
    DecodeCase(1, 32768),
    DecodeCase(8, 32768),
    DecodeCase(1, 131072),
    DecodeCase(4, 65536),
    DecodeCase(8, 131072),
    DecodeCase(1, 131072, rows=7),
)


@dataclasses.dataclass(frozen=True)
class Buffers:
    """What one layer has: a step's queries, its cache and page index; rows with the step's own, and before it."""

    q: Tensor
    k: Tensor
    v: Tensor
    sums: Tensor
    counts: Tensor
    lengths: Tensor
    before: Tensor
    seed: Tensor
    teams: Tensor

    @staticmethod
    def random(case: DecodeCase, device: str = "cuda") -> Buffers:
        """Normal queries, keys and values, and the index of these keys."""

        def normal(heads: int, length: int) -> Tensor:
            return torch.empty(case.batch, heads, length, case.dim, dtype=torch.bfloat16, device=device).normal_()

        k = normal(case.kv_heads, case.length)
        sums, counts = torch.ops.tsa.page_sums(k, None, 1, None, None, None)
        lengths = torch.full((case.batch,), case.length, dtype=torch.int32, device=device)
        return Buffers(
            normal(case.heads, case.rows), k, normal(case.kv_heads, case.length), sums, counts, lengths, lengths - case.rows,
            torch.zeros(1, dtype=torch.int64, device=device), torch.ops.tsa.page_teams(k, None, 1, None, None, None, 4),
        )  # fmt: skip
