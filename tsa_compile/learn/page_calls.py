"""Runs the attentions of decode steps under `PageSparse` as it is told: each call of `tsa::page_attention`, one by one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.common.pages import PAGE
from tsa_compile.recorder import around_graphs

Tensor = torch.Tensor
_select, _attend = torch.ops.tsa.select_pages.default, torch.ops.tsa.page_attention.default
_complete = torch.ops.tsa.complete_pages.default
_KEEP = 9  # its place among the arguments of `tsa::select_pages`, before the table and the mass


class PageCall:
    """The attention of one layer in one decode step of one row, without padding.

    Args:
        attended: arguments of `tsa::page_attention`.
        chosen_by: those of the `tsa::select_pages` that gave its lists.
        completed: those of `tsa::complete_pages` behind it; None: there is none.
    """

    def __init__(self, attended: Sequence[Any], chosen_by: Sequence[Any], completed: Sequence[Any] | None) -> None:
        self._attended, self._chosen_by, self._completed = attended, chosen_by, completed
        self.lists: int = attended[1].shape[1]  # one for each KV head

    def exact(self) -> Tensor:
        """Of every key: `[1, H, 1, Dv]`, stored as the operator's result is."""
        q, k, v, _, _, *view, key_mask, scale, mask, sinks, softcap, causal = self._attended
        out: Tensor = torch.ops.tsa.decode_attention(q, k, v, *view, key_mask, scale, mask, sinks, softcap, 0, causal)[0]
        return out

    def sparse(self, keep: Sequence[float]) -> tuple[Tensor, Tensor]:
        """(what the policy gives if each list has `keep` of the row's pages, one number or one a list; the share read `[Hk]`)."""
        by, rest = self._chosen_by, self._attended[5:]
        lists = _select(*by[:_KEEP], list(keep), [0], 0.0, *by[_KEEP + 3 :])
        out, lse = _attend(*self._attended[:3], *lists, *rest)
        if self._completed is not None:
            out = _complete(out, lse, *self._completed[2:5], *lists, *self._completed[7:])[0]
        return out, lists[1][0] / self._pages()

    def _pages(self) -> Tensor | int:
        """Of the row, the open one included."""
        k, (start, lengths) = self._attended[1], self._attended[7:9]
        end = k.shape[2] if lengths is None else lengths[0] if start is None else start[0] + lengths[0]
        return (end + PAGE - 1) // PAGE


Handle = Callable[[int, PageCall], Tensor]


@contextlib.contextmanager
def handled(handle: Handle, completion: bool) -> Iterator[None]:
    """Inside, in graphs of this thread, the result of each attention is that of `handle(number, call)`; numbers count from 0.

    Args:
        completion: do attentions end with `tsa::complete_pages`?

    Raises, as they run:
        ValueError: a batch, or several rows.
        RuntimeError: an attention reads another one's lists.
    """
    calls = _Calls(handle, completion)
    with around_graphs(lambda: _Handled(calls)):
        yield


class _Calls:
    """What is known of the running attention."""

    def __init__(self, handle: Handle, completion: bool) -> None:
        self._handle, self._completion, self._next = handle, completion, 0
        self._chosen: tuple[Tensor, tuple[Any, ...]] | None = None  # the latest lists, and what they were made of
        self._attended: tuple[Any, ...] | None = None

    def select(self, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        lists: tuple[Tensor, Tensor] = _select(*args)
        self._chosen = lists[0], args
        return lists

    def attend(self, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        if args[0].shape[0] != 1 or args[0].shape[2] != 1:
            raise ValueError(f"only steps of one row are measured, one text at a time, got queries {tuple(args[0].shape)}")
        if self._chosen is None or self._chosen[0] is not args[3]:
            raise RuntimeError("an attention reads lists that it has not made itself: leave Plan.reuse out")
        if self._completion:
            self._attended = args
            out, lse = _attend(*args)
            return out, lse
        out = self._run(args, None)
        return out, out.new_empty(out.shape[:3], dtype=torch.float32)

    def complete(self, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        assert self._attended is not None
        out = self._run(self._attended, args)
        return out, out.new_empty(out.shape[:3], dtype=torch.float32)

    def _run(self, attended: tuple[Any, ...], completed: tuple[Any, ...] | None) -> Tensor:
        assert self._chosen is not None
        number, self._next = self._next, self._next + 1
        return self._handle(number, PageCall(attended, self._chosen[1], completed))


class _Handled(TorchDispatchMode):
    def __init__(self, calls: _Calls) -> None:
        super().__init__()
        self._own = {_select: calls.select, _attend: calls.attend, _complete: calls.complete}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = self._own.get(func)
        return func(*args, **(kwargs or {})) if own is None else own(args)
