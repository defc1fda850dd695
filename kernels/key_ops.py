"""The operators of bidirectional attention, `tsa::select_keys` and `tsa::key_attention` (docs/operators.md); no Triton."""

from __future__ import annotations

from typing import Any

import torch

from tsa_compile.kernels.attend.keys.reference import key_attention_reference
from tsa_compile.kernels.checks import check_attention, check_lists
from tsa_compile.kernels.ops import LIBRARY, OBSERVERS, empty_result, register
from tsa_compile.kernels.select.keys.reference import select_keys_reference

Tensor = torch.Tensor
_SELECT, _ATTEND = "tsa::select_keys", "tsa::key_attention"

LIBRARY.define(
    "select_keys(Tensor q, Tensor k, Tensor? key_mask, float scale, float coverage, int probes, int min_keys)"
    " -> (Tensor indices, Tensor counts)"
)
LIBRARY.define("key_attention(Tensor q, Tensor k, Tensor v, Tensor indices, Tensor counts, float scale) -> Tensor")


def _check_select(q: Tensor, k: Tensor, key_mask: Tensor | None, coverage: float, probes: int, min_keys: int) -> None:
    check_attention(_SELECT, q, k, None, key_mask, causal=False)
    if not 0 <= coverage < 1:
        raise ValueError(f"{_SELECT}: coverage must be in [0, 1), got {coverage}")
    if probes < 1 or min_keys < 1:
        raise ValueError(f"{_SELECT}: probes and min_keys must be at least 1, got {probes} and {min_keys}")


def _select_fake(q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float, *numbers: Any) -> tuple[Tensor, Tensor]:
    _check_select(q, k, key_mask, *numbers)
    indices = q.new_empty((q.shape[0], q.shape[1], k.shape[2]), dtype=torch.int32)
    return indices, q.new_empty((q.shape[0],), dtype=torch.int32)


def _select_cpu(q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float, *numbers: Any) -> tuple[Tensor, Tensor]:
    _check_select(q, k, key_mask, *numbers)
    return _observed(select_keys_reference(q, k, key_mask, scale, *numbers), k)


def _select_cuda(q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float, *numbers: Any) -> tuple[Tensor, Tensor]:
    from tsa_compile.kernels.select.keys.host import select_keys

    _check_select(q, k, key_mask, *numbers)
    return _observed(select_keys(q, k, key_mask, scale, *numbers), k)


def _observed(selected: tuple[Tensor, Tensor], k: Tensor) -> tuple[Tensor, Tensor]:
    for observer in OBSERVERS:
        observer(selected[1], k.shape[2])
    return selected


def _check_attend(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor) -> None:
    check_attention(_ATTEND, q, k, v, None, causal=False)
    check_lists(_ATTEND, q, k, indices, counts)


def _attend_fake(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, scale: float) -> Tensor:
    _check_attend(q, k, v, indices, counts)
    return empty_result(q, v)


def _attend_cpu(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, scale: float) -> Tensor:
    _check_attend(q, k, v, indices, counts)
    return key_attention_reference(q, k, v, indices, counts, scale)


def _attend_cuda(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, scale: float) -> Tensor:
    from tsa_compile.kernels.attend.keys.host import key_attention

    _check_attend(q, k, v, indices, counts)
    return key_attention(q, k, v, indices, counts, scale)


register("select_keys", _select_fake, _select_cpu, _select_cuda)
register("key_attention", _attend_fake, _attend_cpu, _attend_cuda)
