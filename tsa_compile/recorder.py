"""Watch what the selections of a run keep, and in which module: tokens, or key blocks."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from tsa_compile.dynamo import called
from tsa_compile.kernels import ops
from tsa_compile.kernels.common.group import check_agreement, total
from tsa_compile.passes.facts.names import module_path

_SELECTIONS = frozenset(op.name for op in ops.OPERATORS if op.kept is not None)
_threads = threading.local()


class _Graph(NamedTuple):
    """The rewritten graph that this thread runs: its model, and the module of each of its selections."""

    model: nn.Module | None
    modules: Sequence[str]


class KeptTokens:
    """What every selection keeps, in order of execution; numbers stay on the device until they are read."""

    def __init__(self, model: nn.Module | None = None, group: str | None = None) -> None:
        self._group = group
        self._model = None if model is None else called(model)
        self._graph: _Graph | None = None
        self._next = 0
        self._counts: list[tuple[str, torch.Tensor, int]] = []

    def _observe(self, counts: torch.Tensor, of: int) -> None:
        graph: _Graph | None = getattr(_threads, "graph", None)
        if graph is not self._graph:
            self._graph, self._next = graph, 0
        module = graph.modules[self._next] if graph is not None and self._next < len(graph.modules) else ""
        self._next += 1
        if self._model is None or (graph is not None and graph.model is self._model):
            self._counts.append((module, counts, of))

    def shares(self) -> list[float]:
        """Kept share of each selection's keys, or key blocks, in [0, 1], averaged over the batch. Waits for the device."""
        return [share for _, share in self.by_module()]

    def by_module(self) -> list[tuple[str, float]]:
        """(path of the attention module, kept share) of each selection; the path is "" outside of a compiled graph."""
        found = [(int(kept.sum()), of * len(kept)) for _, kept, of in self._counts]
        if self._group is not None and found:
            on = self._counts[0][1].device
            check_agreement("record_kept", {"selections": len(found)}, on, self._group)
            found = total(torch.tensor(found, device=on), self._group).tolist()
        modules = (module for module, _, _ in self._counts)
        return [(module, kept / of if of else 0.0) for module, (kept, of) in zip(modules, found, strict=True)]


@contextlib.contextmanager
def record_kept(model: nn.Module | None = None, group: str | None = None) -> Iterator[KeptTokens]:
    """`with record_kept(model) as kept: model(ids)`, then `kept.shares()`.

    Of this thread only, and of `model` only where one is given. Replays of CUDA graphs are not seen.

    Args:
        model: whose selections are counted; None: those of all.
        group: name of a process group over whose ranks the heads are spread (`parallel.head_group(model)`): shares are of the
            heads of all ranks, the same number on each, and every rank must read them. None: of the heads in this process.
    """
    kept = KeptTokens(model, group)
    with ops.observing(kept._observe):
        yield kept


@contextlib.contextmanager
def running(model: nn.Module | None, modules: Sequence[str]) -> Iterator[None]:
    """Inside, this thread runs a graph of `model` whose selections are, in order, those of `modules`."""
    before = getattr(_threads, "graph", None)
    _threads.graph = _Graph(model, modules)
    try:
        with getattr(_threads, "around", contextlib.nullcontext)():
            yield
    finally:
        _threads.graph = before


@contextlib.contextmanager
def around_graphs(context: Callable[[], contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
    """Inside, each compiled graph of this thread runs within `context()`, such as a dispatch mode that Dynamo must not see."""
    _threads.around = context
    try:
        yield
    finally:
        del _threads.around


def selecting_modules(gm: fx.GraphModule) -> list[str]:
    """The module of each selection of a rewritten graph, in order of execution."""
    targets = {getattr(torch.ops.tsa, name).default for name in _SELECTIONS}
    return [module_path(node) for node in gm.graph.nodes if node.target in targets]
