"""The operators of block sparsity among kept tokens, `tsa::select_blocks` and `tsa::block_sparse_attention`. No Triton."""

from __future__ import annotations

from typing import Any

import torch

from tsa_compile.kernels.attend.blocks.reference import block_sparse_attention_reference, select_blocks_reference
from tsa_compile.kernels.checks import check_attention, check_block_arguments, check_blocks, check_selection
from tsa_compile.kernels.ops import LIBRARY, empty_result, register

Tensor = torch.Tensor
_SELECT, _ATTEND = "tsa::select_blocks", "tsa::block_sparse_attention"

LIBRARY.define(
    "select_blocks(Tensor q, Tensor k, Tensor indices, Tensor counts, float scale, int block, int pool, float mass, int sinks,"
    " int local, int dense_below) -> (Tensor blocks, Tensor block_counts)"
)
LIBRARY.define(
    "block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor indices, Tensor counts, Tensor heavy_indices, Tensor blocks,"
    " Tensor block_counts, Tensor? key_mask, float scale, int strip_window, int strip_sinks, int block, str engine) -> Tensor"
)


def _check_select_blocks(q: Tensor, k: Tensor, indices: Tensor, counts: Tensor, *numbers: Any) -> None:
    check_attention(_SELECT, q, k, None, None)
    check_selection(_SELECT, q, k, indices, counts, indices[..., :0])
    check_block_arguments(_SELECT, *numbers[1:6])


def _blocks_fake(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _check_select_blocks(q, k, *rest)
    (batch, heads), n = q.shape[:2], -(-k.shape[2] // rest[3])
    return q.new_empty(batch, heads, n, n, dtype=torch.int16), q.new_empty(batch, heads, n, dtype=torch.int32)


def _blocks_cpu(*args: Any) -> tuple[Tensor, Tensor]:
    _check_select_blocks(*args)
    return select_blocks_reference(*args)


def _blocks_cuda(*args: Any) -> tuple[Tensor, Tensor]:
    from tsa_compile.kernels.attend.blocks.host import select_blocks

    _check_select_blocks(*args)
    return select_blocks(*args)


def _check_block_sparse(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> None:
    engine = rest[-1]
    check_attention(_ATTEND, q, k, v, rest[5])
    check_selection(_ATTEND, q, k, *rest[:3])
    check_blocks(_ATTEND, q, k, *rest[3:5], rest[-2])
    if engine not in ("auto", "fused", "reference"):
        raise ValueError(f"{_ATTEND}: engine must be auto, fused or reference, got {engine!r}")


def _block_sparse_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    _check_block_sparse(q, k, v, *rest)
    return empty_result(q, v)


def _block_sparse_cpu(*args: Any) -> Tensor:
    _check_block_sparse(*args)
    if args[-1] == "fused":
        raise RuntimeError(f"{_ATTEND}: engine 'fused' needs CUDA tensors; on CPU use auto or reference")
    return block_sparse_attention_reference(*args)


def _block_sparse_cuda(*args: Any) -> Tensor:
    from tsa_compile.kernels.attend.blocks.host import block_sparse_attention

    _check_block_sparse(*args)
    return block_sparse_attention(*args)


register("select_blocks", _blocks_fake, _blocks_cpu, _blocks_cuda)
register("block_sparse_attention", _block_sparse_fake, _block_sparse_cpu, _block_sparse_cuda)
