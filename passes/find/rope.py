"""How a site's queries and keys are rotated by their positions (RoPE): read off by running that part of the graph.

No form is assumed. From queries or keys the walk goes back through operators that are linear in them, until one tensor is left
that positions had no part in: these are the queries or keys before their rotation. Between them stands a linear map for each
position, which is run on random numbers at several positions, and must be a rotation of pairs by angles `position * frequency`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

import torch
import torch.fx as fx

from tsa_compile.kernels.common.rotation import before_rotation
from tsa_compile.kernels.types import Rotation
from tsa_compile.passes.facts.names import describe, is_getitem, op_name, source, tensor_of
from tsa_compile.passes.find.run_part import Part, known_size

_LINEAR = frozenset(
    {"add", "sub", "mul", "neg", "div", "cat", "stack", "view", "flatten", "unflatten", "unsqueeze", "squeeze", "transpose",
     "permute", "movedim", "to", "type_as", "contiguous", "clone", "slice", "select", "chunk", "split", "unbind", "narrow",
     "expand", "repeat", "roll", "flip", "float", "complex", "view_as_complex", "view_as_real"}
)  # fmt: skip
_ORDERS = frozenset({"transpose", "permute", "movedim", "contiguous", "to"})
_PROBES = (1, 32, 1024, 32768)  # from one to the next an angle is known well enough to count its turns
_CHECKS = (0, 3, 77, 4097, 30011, 99991)
_MOST = 200  # nodes between
_POSITIONS = re.compile(r"pos|offset$")  # in the names of inputs that may hold them: `position_ids`, our cache's `offset`


class NotRotated(Exception):
    """No rotation was found, or none that is known; the message says why."""


class Rotations:
    """Finds the rotations of one graph.

    Args:
        gm: the graph, as it was traced.
        constants: tensors whose values are known, by placeholder name.

    Attributes:
        read: names of those that what was found depends on.
    """

    def __init__(self, gm: fx.GraphModule, constants: Mapping[str, torch.Tensor]) -> None:
        self._gm, self._constants, self.read = gm, constants, frozenset[str]()
        self._order = {node: n for n, node in enumerate(gm.graph.nodes)}
        self._depends = dict(self._dependencies())

    def of(self, x: fx.Node) -> tuple[Rotation, fx.Node]:
        """How `x`, heads of `D` numbers in its last dim, was rotated, and the input of the graph that holds the positions.

        Raises:
            NotRotated: it was not, or in no way that is known.
        """
        before, positions = self._before(x)
        shape = _shape(before)
        while _shape(x) != shape and op_name(x) in _ORDERS:
            x = source(x)
        if _shape(x) != shape or len(shape) != 4:
            raise NotRotated(f"{describe(before)} before the rotation has another shape than {describe(x)} behind it")
        part = Part(self._gm, self._constants, self._order, x, before, positions)
        found = _rotation(part, shape)
        self.read |= part.constants
        return found, positions

    def _dependencies(self) -> Iterator[tuple[fx.Node, fx.Node | bool | None]]:
        """What a node depends on beside constants: nothing (None), the input with positions alone, or others (True)."""
        found: dict[fx.Node, fx.Node | bool | None] = {}
        for node in self._gm.graph.nodes:
            found[node] = self._input(node) if node.op == "placeholder" else _joined(found[a] for a in node.all_input_nodes)
            yield node, found[node]

    def _input(self, node: fx.Node) -> fx.Node | bool | None:
        example = tensor_of(node)
        if node.name in self._constants or example is None:
            return None  # a size, too
        return node if example.dtype in (torch.int64, torch.int32) and _POSITIONS.search(node.name) else True

    def _before(self, x: fx.Node) -> tuple[fx.Node, fx.Node]:
        """(the tensor before the rotation, the input with the positions)."""
        front, steps, positions = {x}, 0, None
        while positions is None or len(front) > 1 or not _as_heads(next(iter(front)), x):
            last = max(front, key=self._order.__getitem__)
            front.remove(last)
            steps += 1
            if steps > _MOST or not (op_name(last) in _LINEAR or is_getitem(last)):
                raise NotRotated(f"no rotation by positions: the walk back ends at {describe(last)}")
            varying = [a for a in last.all_input_nodes if self._depends[a] is True]
            if op_name(last) in ("mul", "div") and len(varying) != 1:
                raise NotRotated(f"{describe(last)} is not linear")
            for given in (self._depends[a] for a in last.all_input_nodes):
                if isinstance(given, fx.Node):
                    if positions not in (None, given):
                        raise NotRotated(f"positions from {positions} and {given}")
                    positions = given
            front.update(varying)
            if not front:
                raise NotRotated(f"{describe(last)} comes from nothing but positions")
        return front.pop(), positions


def _joined(given: Iterator[fx.Node | bool | None]) -> fx.Node | bool | None:
    known = {x for x in given if x is not None}
    return None if not known else known.pop() if len(known) == 1 else True


def _as_heads(before: fx.Node, x: fx.Node) -> bool:
    """Has it the dims of `x` `[.., D]`, perhaps in another order?"""
    if tensor_of(before) is None:  # several tensors
        return False
    a, b = _shape(before), _shape(x)
    return sorted(a) == sorted(b) and a[-1:] == b[-1:]


def _shape(x: fx.Node) -> tuple[int, ...]:
    """Sizes, of symbols those of the trace."""
    example = tensor_of(x)
    if example is None:
        raise NotRotated(f"{describe(x)} has no example tensor")
    return tuple(known_size(n) for n in example.shape)


def _rotation(part: Part, shape: tuple[int, ...]) -> Rotation:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    behind = {p: part.run(x, p) for p in sorted({*_PROBES, *_CHECKS})}
    dim, changed = shape[3], _changed(x, behind[99991])
    for pairs in dict.fromkeys((dim // 2, -(-changed // 2))):
        for interleaved in (False, True):
            found = _read(x, behind, pairs, interleaved) if pairs else None
            if found is not None:
                return found
    raise NotRotated("positions change queries or keys otherwise than by a rotation of pairs")


def _changed(x: torch.Tensor, behind: torch.Tensor) -> int:
    """Leading dims up to the last that a rotation changes."""
    moved = ((behind - x).abs() > 1e-4).flatten(0, 2).any(0).nonzero()
    return int(moved.max()) + 1 if len(moved) else 0


def _read(x: torch.Tensor, behind: Mapping[int, torch.Tensor], pairs: int, interleaved: bool) -> Rotation | None:
    """The rotation of so many pairs, if it is one."""
    frequencies, factor = torch.zeros(pairs, dtype=torch.float64), 1.0
    for p in _PROBES:
        turn = _paired(behind[p], pairs, interleaved) / _paired(x, pairs, interleaved)
        factor, angle = float(turn.abs().median()), turn.angle().flatten(0, 2).median(0).values
        turns = torch.round((frequencies * p - angle) / (2 * math.pi)) if p > 1 else 0
        frequencies = (angle + 2 * math.pi * turns) / p
    known = [x if abs(x) > 1e-9 else 0.0 for x in frequencies.float().tolist()]
    while interleaved and len(known) > 1 and known[-1] == 0:
        known.pop()  # dims that are not rotated
    rotation = Rotation(tuple(known), interleaved, 1.0 if abs(factor - 1) < 1e-4 else factor)
    exact = torch.tensor(rotation.frequencies)
    for p, found in behind.items():
        back = before_rotation(found, torch.full(found.shape[:3], p), exact, interleaved, rotation.factor)
        if not (back - x).abs().max() <= 1e-3 + 4e-7 * p * float(exact.abs().max()):  # angles are rounded to float32
            return None
    return rotation


def _paired(x: torch.Tensor, pairs: int, interleaved: bool) -> torch.Tensor:
    """Pairs as complex numbers."""
    x = x[..., : 2 * pairs]
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :pairs], x[..., pairs:])
    return torch.complex(first, second)
