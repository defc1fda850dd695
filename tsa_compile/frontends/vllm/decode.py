"""Decode steps that read pages: an index of the cache's pages by physical block, and a layer's policy over it.

An entry is written when its page is full, by whichever request filled it, so requests that share a cached prefix share its
entries. Numbers lie on the device and sizes are those of the cache, so a step can be recorded in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch

from tsa_compile.frontends.vllm.rows import Split
from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.common.pages import empty_index
from tsa_compile.kernels.types import KvView, Operands
from tsa_compile.passes.site import AttentionSite, MaskFacts
from tsa_compile.policies.base import Policy, call

Tensor = torch.Tensor


def new_index(key: Tensor) -> dict[str, Tensor]:
    """Sums and counts of the pages of `key` `[blocks, Hk, block, D]`: a thirty-second of the cache in bfloat16."""
    sums, counts = empty_index(key)
    return {"sums": sums.zero_(), "counts": counts.zero_()}


def append(index: dict[str, Tensor], key: Tensor, metadata: Any) -> None:
    """Enter the pages that this step filled, in all rows of the batch.

    Args:
        index: of the layer.
        key: `[blocks, Hk, block, D]`, with the step's keys in it.
        metadata: of the step, as every backend of vLLM has it.
    """
    starts, end = metadata.query_start_loc, metadata.seq_lens.int()
    rows = min(len(starts) - 1, len(end))
    new = (starts[1 : rows + 1] - starts[:rows]).int()
    begin = (end[:rows] - new).clamp(min=0)
    where = (metadata.block_table[:rows], key.shape[2], None)
    torch.ops.tsa.append_pages(*index.values(), key, *where, begin, end[:rows], None, metadata.max_query_len)


def sparse_decode(
    policy: Policy, path: str, scale: float, query: Tensor, key: Tensor, value: Tensor, output: Tensor, split: Split,
    index: dict[str, Tensor] | None,
) -> None:  # fmt: skip
    """The decode rows' attention, into `output`. Nothing waits for the device. Arguments: of `sparse_prefill`, and the index."""
    assert index is not None
    block = key.shape[2]
    for run in split.decode:
        q = query[run.begin : run.end, :, None]
        table, lengths = split.block_table[run.first : run.last], split.lengths[run.first : run.last].int()
        operands = Operands(q, key, value, view=KvView(table, block, None, lengths))
        room = table.shape[1] * block
        site = AttentionSite.of(operands, MaskFacts(causal=True), scale, phase="decode", module=path, k_len=room)
        output[run.begin : run.end] = policy.attend(call, site, policy.select(call, site, index))[:, :, 0]
