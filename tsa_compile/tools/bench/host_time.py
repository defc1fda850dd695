"""`tsa-compile bench host`: what one call takes of the host, which a GPU waits for as soon as its own work takes less.

Calls are launched one after the other without waiting for the GPU, few enough that its queue of launches (1,024) never fills.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from tsa_compile.kernels.types import Operands
from tsa_compile.passes.site import AttentionSite, MaskFacts
from tsa_compile.policies.base import Policy, call
from tsa_compile.policies.block_sparse import BlockSparse
from tsa_compile.policies.token_sparse import TokenSparse
from tsa_compile.tools.bench.decode_cases import Buffers, DecodeCase
from tsa_compile.tools.bench.decode_forms import exact, page_forms
from tsa_compile.tools.bench.inputs import structured

if TYPE_CHECKING:
    from rich.table import Table

Tensor = torch.Tensor
Work = Callable[[], Any]
CALLS = 32  # of a round; a call has up to 12 launches
ROUNDS = 25
HEADS, KV_HEADS, DIM = 32, 8, 128
ALWAYS, NEVER = 1, 1 << 30  # as `dense_below`: sparse at any length, and dense


@dataclasses.dataclass(frozen=True)
class HostRow:
    """Microseconds a call: `host`, of the host alone; `call`, of calls in a row, which is the longer of the host's and the
    GPU's time; medians over rounds. `length`: tokens of the prompt, or of the cache."""

    form: str
    length: int
    host: float
    call: float


@torch.no_grad()
def bench_host(lengths: Sequence[int], device: str = "cuda") -> Iterator[HostRow]:
    """Every form at every length: batch 1, 32/8 heads of 128, bfloat16."""
    for length in lengths:
        for form, work in {**prefill_forms(length, device), **decode_forms(length, device)}.items():
            yield HostRow(form, length, *times(work))


def prefill_forms(length: int, device: str) -> dict[str, Work]:
    """A call of one layer's attention over a prompt: dense, and by each policy with its default fields."""
    q, k, v = structured(1, HEADS, KV_HEADS, length, DIM, torch.bfloat16, device)
    mask = torch.arange(length, device=device)[None] >= min(100, length // 4)

    def by(policy: Policy, key_mask: Tensor | None = None, dense_below: int = 0) -> Work:
        site = AttentionSite.of(Operands(q, k, v, key_mask), MaskFacts(causal=True, padded=key_mask is not None))
        site = dataclasses.replace(site, dense_below=dense_below)
        return lambda: policy.attend(call, site, policy.select(call, site, None))

    return {
        "SDPA": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        "BlockSparse": by(BlockSparse(), dense_below=ALWAYS),
        "BlockSparse, dense below": by(BlockSparse(), dense_below=NEVER),
        "BlockSparse, padded": by(BlockSparse(), mask, ALWAYS),
        "TokenSparse": by(TokenSparse()),
        "TokenSparse.paper": by(TokenSparse.paper()),
    }


def decode_forms(length: int, device: str) -> dict[str, Work]:
    """A step of one layer over a cache of so many rows: every key, pages, and the parts of pages."""
    case = DecodeCase(1, length, heads=HEADS, kv_heads=KV_HEADS, dim=DIM)
    x = Buffers.random(case, device)
    work: dict[str, Work] = {"decode, exact": lambda: exact(case, x)}
    pages = {f"decode, {name}": functools.partial(form, x) for name, form in page_forms(case, [x]).items()}
    return work | pages


def times(work: Work) -> tuple[float, float]:
    """(`host`, `call`) of a `HostRow`."""
    for _ in range(5):
        work()
    host, whole = [], []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            work()
        host.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        whole.append(time.perf_counter() - start)
    return 1e6 * statistics.median(host) / CALLS, 1e6 * statistics.median(whole) / CALLS


def table(rows: Sequence[HostRow]) -> Table:
    """Forms by lengths: the host's microseconds, and in brackets those of a call in a row of calls."""
    from rich.table import Table

    made = Table(title="host time of a call, us (in a row of calls)", title_justify="left")
    lengths = sorted({row.length for row in rows})
    made.add_column("form")
    for length in lengths:
        made.add_column(f"{length:,}", justify="right")
    cells = {(row.form, row.length): f"{row.host:.0f} ({row.call:.0f})" for row in rows}
    for form in dict.fromkeys(row.form for row in rows):
        made.add_row(form, *(cells.get((form, length), "") for length in lengths))
    return made
