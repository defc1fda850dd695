"""`tsa-compile tune`: from which length on engine `packed` beats `fused` on this GPU."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tsa_compile.kernels.attend.tokens import engines
from tsa_compile.tools.bench.attention_bench import attend, last_query_scores_of
from tsa_compile.tools.bench.inputs import forced, structured
from tsa_compile.tools.bench.timing import median_ms

LENGTHS = (4096, 8192, 16384, 32768, 65536)
KEEP = 0.5


def tune(head_dims: list[int], heads: int = 32, kv_heads: int = 8) -> dict[str, dict[str, int | None]]:
    """Time both engines at growing lengths, bf16, half of the tokens kept; write and return the table.

    Returns:
        Compute capability -> head dim -> tokens from which `packed` is faster; None: at none of the lengths.

    Raises:
        RuntimeError: engine `packed` cannot run here; the message says why.
    """
    found: dict[str, int | None] = {}
    for dim in head_dims:
        faster = [n for n in LENGTHS if _packed_is_faster(n, dim, heads, kv_heads)]
        slower = [n for n in LENGTHS if n not in faster]
        found[str(dim)] = next((n for n in faster if all(n > s for s in slower)), None)
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    path = engines.tuned_file()
    table: dict[str, dict[str, int | None]] = json.loads(path.read_text()) if path.is_file() else {}
    table.setdefault(capability, {}).update(found)
    path.parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(table) + "\n")
    engines.measured_table.cache_clear()
    return table


def _packed_is_faster(length: int, dim: int, heads: int, kv_heads: int) -> bool:
    q, k, v = structured(1, heads, kv_heads, length, dim, torch.bfloat16, "cuda")
    if not engines.can_pack(q, k, v):
        engines.find_inner(q, v)  # says why
    selection = forced(last_query_scores_of(q, k, dim**-0.5), KEEP, 128, 256)
    times = [median_ms(attend(q, k, v, selection, dim**-0.5, engine, strip=False)) for engine in ("fused", "packed")]
    return times[1] < times[0]
