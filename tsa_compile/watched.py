"""Masks and frequencies of rotations in a module's buffers: read when a graph is compiled, and watched ever after.

Dynamo makes every tensor of a module an input of the graph, so that it may change without a recompile. A mask such as
minGPT's `register_buffer("bias", torch.tril(...))` is proven from its values, and then those must not change unseen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx

from tsa_compile.passes.prove_mask.patterns import Pattern, pattern_of


def module_tensors(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[str, torch.Tensor]:
    """The buffers and other tensors of modules among a Dynamo graph's inputs, by placeholder name.

    Parameters that learn are left out, as are subclasses, and tensors made in inference mode, whose changes nobody counts.
    """
    return {
        node.name: x
        for node, x in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True)
        if is_module_tensor(node) and type(x) in (torch.Tensor, torch.nn.Parameter) and not (x.requires_grad or x.is_inference())
    }


def is_module_tensor(node: fx.Node) -> bool:
    """Is this input of a Dynamo graph a weight or a buffer of a module?"""
    return "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})


class Watched:
    """A compiled graph whose proofs hold while some of its inputs keep their pattern; else the graph as it was runs.

    Costs a comparison of identity and version for each of these inputs and call; a tensor that is new or was written to
    is read again. Writes that PyTorch does not count are not seen: through `tensor.data`, numpy, dlpack or the storage.

    Args:
        compiled: the rewritten graph.
        original: the graph before the passes.
        patterns: input's name -> what was assumed of it.
        tensors: input's name -> the tensor that this was read from.
        on_change: is told once, in words, that the graph as it was runs from now on.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        original: fx.GraphModule,
        patterns: Mapping[str, Pattern],
        tensors: Mapping[str, torch.Tensor],
        on_change: Callable[[str], None],
    ) -> None:
        self._run, self._original, self._on_change = compiled, original, on_change
        self._names = [n.name for n in original.graph.find_nodes(op="placeholder")]
        self._assumed = {self._names.index(name): pattern for name, pattern in patterns.items()}
        self._seen = {i: _state(tensors[self._names[i]]) for i in self._assumed}

    def __call__(self, *args: Any) -> Any:
        changed = [self._names[i] for i, pattern in self._assumed.items() if not self._holds(i, args[i], pattern)]
        if changed:
            self._run, self._assumed = self._original.forward, {}
            self._on_change(f"{', '.join(changed)}: changed since its values were read; the graph runs dense from now on")
        return self._run(*args)

    def _holds(self, i: int, x: torch.Tensor, pattern: Pattern) -> bool:
        if x.is_inference():
            return False
        known, version = self._seen[i]
        if known() is x and version == x._version:
            return True
        self._seen[i] = _state(x)
        return pattern_of(x) == pattern


def _state(x: torch.Tensor) -> tuple[weakref.ref[torch.Tensor], int]:
    return weakref.ref(x), x._version
