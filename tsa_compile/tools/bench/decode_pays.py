"""`tsa-compile tune`: from how many cached tokens on a decode step of `Exact` beats that of transformers on this GPU (`pays.py`).

One layer's step, with what puts its row into the cache, both sides in CUDA graphs. Dense is what transformers does without
padding: `DynamicCache` joins the rows by `torch.cat`, SDPA with `enable_gqa` reads them (K and V are not repeated). `Exact` has
the row written into fixed buffers, and a mask of their free rows, as `steps.py` gives it. What launches take is left out:
transformers launches its steps one by one, and would have to pay that besides.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F

from tsa_compile.cache.storage import capacity_for
from tsa_compile.kernels.types import KvView, Operands
from tsa_compile.passes.site import AttentionSite, MaskFacts
from tsa_compile.pays import Timing, capability
from tsa_compile.policies.base import call
from tsa_compile.policies.exact import Exact
from tsa_compile.tools.bench.timing import graph_ms

Tensor = torch.Tensor
LENGTHS = (256, 1024, 4096, 16384, 32768, 65536, 131072)  # tokens, with the step's own
SHAPES = ((32, 8), (32, 32), (12, 2))  # query and KV heads
BATCHES = (1, 8)
ROUND_BYTES = 1 << 28  # read in a round at least, so that L2 holds nothing of the next layer's; but
MOST_LAYERS = 32
ROOM = 4  # times the keys and values of a round, that must be free


@dataclasses.dataclass(frozen=True)
class StepSize:
    """One layer's step: bf16, `batch` rows with `length` tokens each."""

    batch: int
    heads: int
    kv_heads: int
    dim: int
    length: int
    device: str = "cuda"

    @property
    def kv_bytes(self) -> int:
        return 4 * self.batch * self.kv_heads * self.length * self.dim

    @property
    def layers(self) -> int:
        """Whose steps follow each other, each on rows of its own."""
        return min(MOST_LAYERS, math.ceil(ROUND_BYTES / self.kv_bytes))

    def random(self, heads: int, rows: int) -> Tensor:
        """Normal, `[batch, heads, rows, dim]`."""
        return torch.empty(self.batch, heads, rows, self.dim, dtype=torch.bfloat16, device=self.device).normal_()

    def new(self) -> tuple[Tensor, Tensor, Tensor]:
        """The step's query, key and value."""
        return self.random(self.heads, 1), self.random(self.kv_heads, 1), self.random(self.kv_heads, 1)


@torch.no_grad()
def measure(head_dims: Iterable[int], tell: Callable[[Timing], None] = lambda row: None) -> list[Timing]:
    """Rows for this GPU, of `Exact` by head dim, heads and batch; lengths that do not fit its memory are left out.

    Args:
        head_dims: of the attention.
        tell: called with each row as it is there.
    """
    rows = []
    for dim in head_dims:
        for heads, kv_heads in SHAPES:
            for batch in BATCHES:
                rows.append(_row(batch, heads, kv_heads, dim))
                tell(rows[-1])
    return rows


def _row(batch: int, heads: int, kv_heads: int, dim: int) -> Timing:
    sizes = [StepSize(batch, heads, kv_heads, dim, n) for n in LENGTHS]
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    sizes = [size for size in sizes if ROOM * size.kv_bytes * size.layers < free]
    times = [(round(_graph_ms(dense(s), s), 4), round(_graph_ms(exact(s), s), 4)) for s in sizes]
    columns = [tuple(column) for column in zip(*times, strict=True)] or [(), ()]
    own = capability(torch.device("cuda"))
    assert own is not None
    lengths, kept = tuple(s.length for s in sizes), (1.0,) * len(sizes)
    return Timing(own, Exact().name, dim, heads, kv_heads, lengths, columns[0], columns[1], kept, batch)


def _graph_ms(steps: Callable[[], Iterator[Tensor]], size: StepSize) -> float:
    """Milliseconds a layer."""

    def work() -> None:
        for _ in steps():
            pass

    return graph_ms(work) / size.layers


def dense(size: StepSize) -> Callable[[], Iterator[Tensor]]:
    """A round of steps, one a layer, as transformers does them; each gives its output `[batch, heads, 1, dim]`."""
    layers = [[size.random(size.kv_heads, size.length - 1) for _ in range(2)] for _ in range(size.layers)]
    q, k, v = size.new()

    def steps() -> Iterator[Tensor]:
        for keys, values in layers:
            joined = torch.cat([keys, k], -2), torch.cat([values, v], -2)
            yield F.scaled_dot_product_attention(q, *joined, enable_gqa=size.heads > size.kv_heads)

    return steps


def exact(size: StepSize) -> Callable[[], Iterator[Tensor]]:
    """The same on fixed buffers, by `Exact`."""
    capacity = capacity_for(size.length)
    layers = [[size.random(size.kv_heads, capacity) for _ in range(2)] for _ in range(size.layers)]
    new = size.new()
    batch = torch.arange(size.batch, device=size.device)[:, None]
    at = torch.full_like(batch, size.length - 1)
    mask = (torch.arange(capacity, device=size.device) < size.length).expand(size.batch, -1).contiguous()

    def steps() -> Iterator[Tensor]:
        start, lengths = torch.ops.tsa.padding_range(mask)  # a graph has one for all layers
        for keys, values in layers:
            for buffer, row in ((keys, new[1]), (values, new[2])):
                buffer[batch, :, at] = row.transpose(1, 2)
            view = KvView(None, 1, start, lengths)
            site = AttentionSite.of(Operands(new[0], keys, values, mask, view=view), MaskFacts(padded=True), phase="decode")
            yield Exact().attend(call, site, None)

    return steps
