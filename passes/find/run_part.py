"""Runs a part of a graph on numbers, as it is compiled: what cannot be read off nodes may be read off their results."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from tsa_compile.passes.facts.names import op_name, tensor, value_of

_CASTS = frozenset({"to", "type_as", "float", "half", "bfloat16", "double"})


class Part:
    """What leads from the node `begin` and the input `positions` to the node `end`, by constants.

    It runs in the precision of what it is given: casts from one floating dtype to another are left out, so that results do not
    have the rounding of the model's dtype.

    Args:
        gm: the graph.
        constants: tensors whose values are known, by placeholder name.
        order: the place of each node.
        end, begin, positions: as above.

    Attributes:
        constants: names of those that it reads.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        constants: Mapping[str, torch.Tensor],
        order: Mapping[fx.Node, int],
        end: fx.Node,
        begin: fx.Node,
        positions: fx.Node,
    ) -> None:
        self._gm, self._constants, self._begin, self._positions, self._end = gm, constants, begin, positions, end
        needed, front = {end}, [end]
        while front:
            for node in front.pop().all_input_nodes:
                if node not in needed:
                    needed.add(node)
                    if node not in (begin, positions):
                        front.append(node)
        self.constants = frozenset(node.name for node in needed if node.name in constants)
        self._nodes = sorted(needed - {begin, positions}, key=order.__getitem__)

    def run(self, x: torch.Tensor, position: int) -> torch.Tensor:
        """`end` on the CPU, if `begin` is `x` and every position is `position`."""
        example = tensor(self._positions)
        sizes, device = [known_size(n) for n in example.shape], example.device
        with torch.no_grad(), unset_fake_temporarily():
            values: dict[fx.Node, Any] = {
                self._begin: x.to(device),
                self._positions: torch.full(sizes, position, dtype=example.dtype, device=device),
            }
            for node in self._nodes:
                values[node] = self._value(node, values)
            result: torch.Tensor = values[self._end]
            return result.cpu()

    def _value(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        if node.op == "placeholder":
            known = self._constants.get(node.name)
            return known if known is not None else known_size(value_of(node))
        if node.op == "get_attr":
            return functools.reduce(getattr, str(node.target).split("."), self._gm)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        if op_name(node) in _CASTS and isinstance(args[0], torch.Tensor) and _is_float(args[0]) and _is_float(tensor(node)):
            return args[0]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _is_float(x: torch.Tensor) -> bool:
    return x.is_floating_point()


def known_size(n: Any) -> int:
    """A size; of a symbol that of the trace."""
    return n if isinstance(n, int) else int(n.node.hint)
