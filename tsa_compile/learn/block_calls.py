"""Runs the attentions of a model under `BlockSparse` as it is told: each call of `tsa::key_block_attention`, one by one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.common.row_blocks import sparse_rows
from tsa_compile.kernels.kept import pairs_read
from tsa_compile.recorder import around_graphs

Tensor = torch.Tensor
_select, _attend = torch.ops.tsa.select_key_blocks.default, torch.ops.tsa.key_block_attention.default
_ALPHA, _LAST_DENSE = 8, 12  # their places among the arguments of `tsa::select_key_blocks`


class BlockCall:
    """The attention of one layer to a whole prompt without padding.

    Args:
        q, k, v: `[1, H, L, D]`, `[1, Hk, L, D]`, `[1, Hk, L, Dv]`.
        scale: of the scores.
        bits: the key blocks that the plan's policy reads, int64 `[1, lists, row blocks, words]`. Lists: one for each query head,
            or for each KV head with `share="group"`.
        chosen_by: arguments of the `tsa::select_key_blocks` that gave them.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, bits: Tensor, chosen_by: tuple[tuple[Any, ...], Mapping[str, Any]]
    ) -> None:
        self.q, self.k, self.v, self.scale = q, k, v, scale
        self.lists: int = bits.shape[1]
        self._bits, self._chosen_by = bits, chosen_by

    @property
    def sparse_rows(self) -> int:
        """Rows before those that the policy's `last_dense` makes dense."""
        last_dense: int = self._chosen_by[0][_LAST_DENSE]
        return sparse_rows(self.q.shape[2], last_dense)

    def dense(self) -> Tensor:
        """Exact causal attention, `[1, H, L, Dv]`."""
        out = F.scaled_dot_product_attention(self.q, self.k, self.v, is_causal=True, scale=self.scale, enable_gqa=True)
        return out.transpose(1, 2).contiguous().transpose(1, 2)  # stored as the operator's result is

    def sparse(self, alpha: Sequence[float] | None = None) -> tuple[Tensor, Tensor]:
        """(what the policy gives at `alpha`, `[1, H, L, Dv]`; the share of the causal pairs that each list reads, `[lists]`).

        Args:
            alpha: one number or one for each query head; None: the plan's own.
        """
        args, named = self._chosen_by
        bits = self._bits if alpha is None else _select(*args[:_ALPHA], list(alpha), *args[_ALPHA + 1 :], **named)
        out: Tensor = _attend(self.q, self.k, self.v, bits, None, 1, None, None, None, self.scale, False)[0]
        return out, pairs_read(bits, self.q.shape[2])[0]


Handle = Callable[[int, BlockCall], Tensor]


@contextlib.contextmanager
def handled(handle: Handle) -> Iterator[None]:
    """Inside, in graphs of this thread, the result of each attention is that of `handle(number, call)`; numbers count from 0.

    Raises, as they run:
        ValueError: a batch, a cache or padding.
    """
    calls = _Calls(handle)
    with around_graphs(lambda: _Handled(calls)):
        yield


class _Calls:
    """What is known of a run, which may have several graphs."""

    def __init__(self, handle: Handle) -> None:
        self._handle, self._next = handle, 0
        self._selections: dict[int, tuple[Tensor, tuple[tuple[Any, ...], Mapping[str, Any]]]] = {}

    def select(self, args: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
        bits: Tensor = _select(*args, **named)
        self._selections[id(bits)] = bits, (args, named)
        return bits

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bits: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
        blocks, _, start, lengths, key_mask, scale, need_lse = rest
        view = (blocks, start, lengths, key_mask)
        if q.shape[0] != 1 or q.shape[2] != k.shape[2] or need_lse or any(x is not None for x in view):
            raise ValueError(f"only whole prompts without padding are measured, one at a time, got queries {tuple(q.shape)}")
        call = BlockCall(q, k, v, scale, *self._selections[id(bits)])
        self._next += 1
        return self._handle(self._next - 1, call), q.new_empty(0, dtype=torch.float32)


class _Handled(TorchDispatchMode):
    def __init__(self, calls: _Calls) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func is _select:
            return self._calls.select(args, named)
        return (self._calls.attend if func is _attend else func)(*args, **named)
