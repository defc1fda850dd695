"""Block-sparse prefill on a GPU: checked against float64, then timed beside dense attention, with the errors that it costs.

`python -m tsa_compile.tools.bench.block_sparse --out FOLDER`: a table on standard output and `block_sparse.json` in FOLDER.
Nothing is timed if a check fails. Times are medians; below 16K tokens of CUDA graphs, on all sides: launches do not count.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.kept import pairs_read
from tsa_compile.kernels.types import PageBitmap
from tsa_compile.passes.site import AttentionSite, MaskFacts, Operands
from tsa_compile.policies.base import call
from tsa_compile.policies.block_sparse import BlockSparse
from tsa_compile.tools.bench.attention_bench import dense_forms
from tsa_compile.tools.bench.block_sparse_checks import check_all
from tsa_compile.tools.bench.structured_inputs import structured_heads
from tsa_compile.tools.bench.timing import GRAPHED_BELOW, environment, graph_ms, median_ms

Tensor = torch.Tensor
ALPHAS = (0.4, 0.18, 0.1, 0.05, 0.02)
POOLS = (128, 16)
LENGTHS = (8192, 32768, 131072)


@dataclasses.dataclass(frozen=True)
class Row:
    """One setting at one length: milliseconds of the whole and of its parts, share of the causal pairs, relative errors."""

    length: int
    pool: int
    alpha: float | tuple[float, ...]
    ms: float
    means_ms: float
    select_ms: float
    attend_ms: float
    pairs: float
    err_all: float
    err_last: float
    err_worst_head: float
    err_needle: float


def timed(work: Callable[[], Any], length: int) -> float:
    return graph_ms(work) if length < GRAPHED_BELOW else median_ms(work, 5)


def exact_last(q: Tensor, k: Tensor, v: Tensor, rows: int = 128) -> Tensor:
    """The last rows in float32, `[1, H, rows, D]`."""
    length, group = q.shape[2], q.shape[1] // k.shape[1]
    hidden = torch.arange(length, device=q.device) > torch.arange(length - rows, length, device=q.device)[:, None]
    out = []
    for h in range(k.shape[1]):
        scores = q[0, h * group : (h + 1) * group, -rows:].float() @ k[0, h].float().T * q.shape[3] ** -0.5
        out.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[0, h].float())
    return torch.cat(out)[None]


def errors(out: Tensor, dense: Tensor, last: Tensor, needle_rows: Tensor) -> dict[str, float]:
    """Relative L2 errors: all rows, the last rows against float32, the worst head, the rows that look for needles."""
    parts = torch.zeros(4, out.shape[1], dtype=torch.float64, device=out.device)
    for h in range(out.shape[1]):
        wrong, right = (out[0, h].float() - dense[0, h].float()).square(), dense[0, h].float().square()
        for n, x in enumerate((wrong, right, wrong[needle_rows], right[needle_rows])):
            parts[n, h] = x.sum()
    wrong, right, far, near = parts
    tail = out[:, :, -last.shape[2] :].float()
    return {
        "err_all": (wrong.sum() / right.sum()).sqrt().item(),
        "err_last": ((tail - last).norm() / last.norm()).item(),
        "err_worst_head": (wrong / right).sqrt().max().item(),
        "err_needle": (far.sum() / near.sum()).sqrt().item(),
    }


class Inputs(NamedTuple):
    """Queries, keys and values of one prompt, what dense attention makes of them, and how long that takes.

    Args:
        q, k, v: `[1, H, L, D]`, `[1, Hk, L, D]` twice.
        needle_rows: those that look for a needle.
        dense: `[1, H, L, D]`. last: its last rows in float32.
        dense_ms: milliseconds of each dense form.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    needle_rows: Tensor
    dense: Tensor
    last: Tensor
    dense_ms: dict[str, float]

    @classmethod
    def structured(cls, length: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.bfloat16) -> Inputs:
        """Of seed 0."""
        q, k, v, needle_rows = structured_heads(length, heads, kv_heads, dim, dtype=dtype)
        forms = dense_forms(q, v, {})
        dense_ms = {name: timed(partial(form, q, k, v), length) for name, form in forms.items()}
        return cls(q, k, v, needle_rows, forms["SDPA"](q, k, v), exact_last(q, k, v), dense_ms)

    @property
    def site(self) -> AttentionSite:
        return AttentionSite.of(Operands(self.q, self.k, self.v), MaskFacts(True), self.q.shape[3] ** -0.5)


def run(x: Inputs, policy: BlockSparse) -> tuple[Tensor, Tensor]:
    """(Output `[1, H, L, D]`, bitmap) of a policy."""
    selection = policy.select(call, x.site, None)
    assert selection is not None  # the site names no length below which every key is read
    return policy.attend(call, x.site, selection), selection.bits


def measure(x: Inputs, policy: BlockSparse) -> Row:
    """Times, pairs and errors of a policy."""
    out, bits = run(x, policy)
    length, site, selection = x.q.shape[2], x.site, PageBitmap(bits)
    means = torch.ops.tsa.key_block_means(x.k, None, None, None)
    alpha = policy.alpha if isinstance(policy.alpha, tuple) else (policy.alpha,)
    rule = (site.scale, list(alpha), policy.pool, policy.window, policy.sinks, policy.last_dense)
    choose = partial(torch.ops.tsa.select_key_blocks, x.q, x.k, *means, None, None, None, *rule)
    return Row(
        length, policy.pool, policy.alpha,
        ms=timed(lambda: policy.attend(call, site, policy.select(call, site, None)), length),
        means_ms=timed(lambda: torch.ops.tsa.key_block_means(x.k, None, None, None), length),
        select_ms=timed(choose, length),
        attend_ms=timed(lambda: policy.attend(call, site, selection), length),
        pairs=pairs_read(bits, length).mean().item(),
        **errors(out, x.dense, x.last, x.needle_rows),
    )  # fmt: skip


def bench_length(length: int, heads: int, kv_heads: int, dim: int) -> tuple[dict[str, float], list[Row]]:
    """(milliseconds of dense forms, a row for each pool and alpha) on inputs of seed 0 in bfloat16."""
    x, rows = Inputs.structured(length, heads, kv_heads, dim), []
    for pool in POOLS:
        for alpha in ALPHAS:
            rows.append(measure(x, BlockSparse(alpha=alpha, pool=pool)))
            print(line(rows[-1], x.dense_ms), flush=True)
    return x.dense_ms, rows


def line(row: Row, dense_ms: dict[str, float]) -> str:
    parts = f"{row.ms:8.3f} ms ({row.means_ms:.3f} + {row.select_ms:.3f} + {row.attend_ms:.3f})"
    ups = ", ".join(f"{ms / row.ms:.2f}x {name}" for name, ms in dense_ms.items())
    wrong = " / ".join(f"{100 * x:.1f}" for x in (row.err_all, row.err_last, row.err_worst_head, row.err_needle))
    alpha = "by head" if isinstance(row.alpha, tuple) else f"{row.alpha:.4g}"
    return f"{row.length:7d} pool {row.pool:3d} alpha {alpha:7} {parts} {ups}; pairs {100 * row.pairs:.1f} %; err {wrong} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of block_sparse.json")
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--no-checks", action="store_true", help="time without checking first")
    given, started = parser.parse_args(), time.time()
    given.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"environment": environment(), "checks": {} if given.no_checks else check_all(), "lengths": {}}
    print("err: all rows / last 128 / worst head / rows that look for needles; ms: whole (means + selection + attention)")
    for length in given.lengths:
        dense_ms, rows = bench_length(length, given.heads, given.kv_heads, given.dim)
        print(f"{length:7d} dense " + ", ".join(f"{name} {ms:.3f} ms" for name, ms in dense_ms.items()), flush=True)
        result["lengths"][length] = {"dense_ms": dense_ms, "rows": [dataclasses.asdict(r) for r in rows]}
        (given.out / "block_sparse.json").write_text(json.dumps(result, indent=1))
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
