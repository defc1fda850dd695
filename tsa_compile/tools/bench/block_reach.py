"""Every row of the table that block-sparse prefill is held to, beside dense attention and FlashPrefill v2's published ratios.

    python -m tsa_compile.tools.bench.block_reach --out FOLDER

finds, for each row, the alphas at which the output's error over all rows comes up to the row's bound, and times the policy there:
one alpha for all heads, and alphas by head that were fitted on inputs of another seed. Rows go to FOLDER/block_reach.json as they
are measured; what is there is not measured again. Dense forms are timed in the same run. Nothing is timed if a check fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tsa_compile.kernels.kept import pairs_read
from tsa_compile.learn.equal_pairs import cheapest
from tsa_compile.policies.block_sparse import BlockSparse
from tsa_compile.tools.bench.block_sparse import Inputs, Row, errors, line, measure, run
from tsa_compile.tools.bench.block_sparse_checks import check_all
from tsa_compile.tools.bench.structured_inputs import structured_heads
from tsa_compile.tools.bench.timing import environment
from tsa_compile.tools.evaluate.text_tables import markdown_table

Tensor = torch.Tensor
GRID = (0.9, 0.6, 0.4, 0.25, 0.18, 0.12, 0.08, 0.05, 0.03, 0.02, 0.012, 0.007, 0.004, 0.002)
HALF, BRAIN = torch.float16, torch.bfloat16
STEPS = 9  # of the bisection for an error
_HEAD = (
    "row", "alphas", "ms", "SDPA", "over SDPA", "over FlashAttention-4", "asked", "FlashPrefill v2", "pairs", "error",
    "worst head", "choosing / attending", "TFLOP/s of attending",
)  # fmt: skip


class Case(NamedTuple):
    """A row of the table.

    Args:
        error: over all rows, relative, at most.
        asked, peer: ratio over SDPA that is to be reached, and FlashPrefill v2's; None: not said.
    """

    length: int
    error: float
    dtype: torch.dtype = BRAIN
    dim: int = 128
    heads: int = 32
    kv_heads: int = 8
    asked: float | None = None
    peer: float | None = None


CASES = {
    "128K, 11 %": Case(131072, 0.11, asked=12.0, peer=9.3),
    "128K, 24 %": Case(131072, 0.24, asked=19.0, peer=14.6),
    "32K, 12 %": Case(32768, 0.12, asked=3.3, peer=2.5),
    "8K, 13 %": Case(8192, 0.13, asked=1.6),
    "128K, 11 %, fp16": Case(131072, 0.11, HALF),
    "32K, 12 %, fp16": Case(32768, 0.12, HALF),
    "128K, 11 %, head dim 64": Case(131072, 0.11, dim=64),
    "32K, 12 %, head dim 64": Case(32768, 0.12, dim=64),
    "64K, 11 %, head dim 256": Case(65536, 0.11, dim=256, heads=16, kv_heads=4),
    "16K, 12 %, head dim 256": Case(16384, 0.12, dim=256, heads=16, kv_heads=4),
    "8K, 13 %, head dim 256": Case(8192, 0.13, dim=256, heads=16, kv_heads=4),
}


def fitted(case: Case) -> tuple[float, ...]:
    """An alpha for each head: the fewest pairs for the case's error, on inputs of seed 1.

    A head's error counts by what it is of the whole and by what it is of its own output, so that no head pays for the others.
    """
    q, k, v, rows = structured_heads(case.length, case.heads, case.kv_heads, case.dim, dtype=case.dtype, seed=1)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    x = Inputs(q, k, v, rows, dense, dense[:, :, -1:], {})
    wrong, read = [], []
    for alpha in GRID:
        out, bits = run(x, BlockSparse(alpha=alpha))
        wrong.append(torch.stack([(a.float() - b.float()).square().sum() for a, b in zip(out[0], dense[0], strict=True)]))
        read.append(pairs_read(bits, case.length)[0] / case.heads)
    own = torch.stack([b.float().square().sum() for b in dense[0]]).double().cpu()
    error, pairs = torch.stack(wrong).double().cpu() / own.sum(), torch.stack(read).cpu()
    return spread(error, own / own.sum(), pairs, case.error**2)


def spread(error: Tensor, own: Tensor, pairs: Tensor, bound: float) -> tuple[float, ...]:
    """The alphas of GRID, one a head, whose errors `[alphas, heads]`, squared shares of the whole output, sum to `bound` at most
    with the fewest `pairs`; `own` `[heads]`: shares of the whole output's square."""
    cost = error * (1 + 1 / (own * len(own)))
    low, high = float(pairs.min(0).values.sum()), float(pairs.max(0).values.sum())
    for _ in range(30):
        middle = (low + high) / 2
        chosen = cheapest(cost, pairs, middle)
        low, high = (low, middle) if float(error.gather(0, chosen[None]).sum()) <= bound else (middle, high)
    return tuple(GRID[n] for n in cheapest(cost, pairs, high).tolist())


def at_error(x: Inputs, bound: float, policy_of: Callable[[float], BlockSparse], low: float, high: float) -> BlockSparse:
    """The policy with the largest number in [low, high] whose error over all rows is at most `bound`, by bisection of logarithms.

    Raises:
        ValueError: it is larger even at `low`.
    """
    error = lambda number: errors(run(x, policy_of(number))[0], x.dense, x.last, x.needle_rows)["err_all"]  # noqa: E731
    if error(high) <= bound:
        return policy_of(high)
    if (least := error(low)) > bound:
        raise ValueError(f"the error is {least:.3f} at the smallest alphas, above {bound:g}")
    for _ in range(STEPS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if error(middle) <= bound else (low, middle)
    return policy_of(low)


def policies(x: Inputs, case: Case) -> dict[str, BlockSparse]:
    """One alpha for all heads, and alphas by head times one factor, at the case's error."""
    by_head = fitted(case)
    return {
        "one": at_error(x, case.error, lambda alpha: BlockSparse(alpha=alpha), 1e-3, 0.95),
        "by head": at_error(x, case.error, lambda n: BlockSparse(alpha=tuple(min(a * n, 0.999) for a in by_head)), 0.02, 50.0),
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = []
    for row in rows.values():
        case, ms = CASES[row["case"]], row["ms"]
        over = {name: dense / ms for name, dense in row["dense_ms"].items()}
        flops = 4 * row["pairs"] * case.length * (case.length + 1) / 2 * case.heads * case.dim
        lines.append([
            row["case"], row["way"], f"{ms:.3f}", f"{row['dense_ms']['SDPA']:.3f}", f"{over['SDPA']:.2f}x",
            f"{over['FlashAttention-4']:.2f}x" if "FlashAttention-4" in over else "not installed",
            *(f"{x}x" if x else "" for x in (case.asked, case.peer)), f"{100 * row['pairs']:.1f} %",
            f"{100 * row['err_all']:.1f} %", f"{100 * row['err_worst_head']:.0f} %",
            f"{100 * (row['means_ms'] + row['select_ms']) / row['attend_ms']:.0f} %",
            f"{flops / row['attend_ms'] / 1e9:.0f}",
        ])  # fmt: skip
    return markdown_table([_HEAD, *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of block_reach.json")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop after these; the same command goes on")
    parser.add_argument("--no-checks", action="store_true", help="time without checking first")
    given, started = parser.parse_args(), time.time()
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "block_reach.json"
    result: dict[str, Any] = {"environment": environment(), "rows": {}}
    if path.exists():
        result["rows"] = json.loads(path.read_text())["rows"]
    if not given.no_checks:
        result["checks"] = check_all()
    for name, case in CASES.items():
        if given.only not in name or f"{name}, by head" in result["rows"] or time.time() - started > given.seconds:
            continue
        x = Inputs.structured(case.length, case.heads, case.kv_heads, case.dim, case.dtype)
        for way, policy in policies(x, case).items():
            row: Row = measure(x, policy)
            result["rows"][f"{name}, {way}"] = {"case": name, "way": way, "dense_ms": x.dense_ms, **dataclasses.asdict(row)}
            path.write_text(json.dumps(result, indent=1))
            print(name, line(row, x.dense_ms), f"{time.time() - started:.0f} s", flush=True)
    print(table(result["rows"]))


if __name__ == "__main__":
    main()
