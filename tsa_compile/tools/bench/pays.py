"""`tsa-compile tune`: from which length on the default prefill policy beats PyTorch's SDPA on this GPU (`pays.py`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F

from tsa_compile.kernels.types import Operands
from tsa_compile.passes.site import AttentionSite, MaskFacts
from tsa_compile.pays import Timing
from tsa_compile.policies.base import Policy, call
from tsa_compile.policies.block_sparse import BlockSparse
from tsa_compile.recorder import record_kept
from tsa_compile.tools.bench.inputs import structured
from tsa_compile.tools.bench.timing import launched_ms

LENGTHS = (1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 32768, 65536)
SHAPES = ((32, 8), (8, 2))  # query and KV heads
AT_ANY_LENGTH = 1  # as `dense_below`: one call of one operator, as the default plan has it, which chooses at every length


@torch.no_grad()
def measure(
    head_dims: Iterable[int], policy: Policy | None = None, tell: Callable[[Timing], None] = lambda row: None
) -> list[Timing]:
    """Rows for this GPU, in bfloat16, batch 1, on inputs with sinks, local decay and heavy tokens.

    Args:
        head_dims: of the attention.
        policy: with its default fields; None: `BlockSparse()`.
        tell: called with each row as it is there.
    """
    policy = policy or BlockSparse()
    rows = []
    for dim in head_dims:
        for heads, kv_heads in SHAPES:
            rows.append(_row(policy, heads, kv_heads, dim))
            tell(rows[-1])
    return rows


def _row(policy: Policy, heads: int, kv_heads: int, dim: int) -> Timing:
    times = [_times(policy, heads, kv_heads, dim, n) for n in LENGTHS]
    dense, sparse, kept = (tuple(round(x, 4) for x in column) for column in zip(*times, strict=True))
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    return Timing(capability, policy.name, dim, heads, kv_heads, LENGTHS, dense, sparse, kept)


def _times(policy: Policy, heads: int, kv_heads: int, dim: int, length: int) -> tuple[float, float, float]:
    """(milliseconds dense, by the policy, share that it keeps)."""
    q, k, v = structured(1, heads, kv_heads, length, dim, torch.bfloat16, "cuda")
    site = AttentionSite.of(Operands(q, k, v), MaskFacts(causal=True))
    site = dataclasses.replace(site, dense_below=AT_ANY_LENGTH if policy.by_length else 0)

    def sparse() -> Any:
        return policy.attend(call, site, policy.select(call, site, None))

    with record_kept() as kept:
        sparse()
    dense = launched_ms(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    return dense, launched_ms(sparse), sum(kept.shares())
