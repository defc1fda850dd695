"""Prove that an attention reads a static cache: a buffer that the graph writes once, new rows at known positions.

Known forms, for a cache of any order of dimensions: `buffer[:, :, positions] = new` (gpt-fast, torchtune), `index_put_`,
`index_copy_` (transformers), `buffer[:batch, start:end] = new` (Llama's own code), `copy_` into such a slice.
Changes nothing. What cannot be proven is an `Unproven` with the reason.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch.fx as fx

from tsa_compile.passes.facts.graph_facts import GraphFacts
from tsa_compile.passes.facts.mutation import writes_to
from tsa_compile.passes.facts.names import SHAPE_READERS, arg, op_name, same_value, tensor_of
from tsa_compile.passes.find.cache_index import Unproven, after_slices, index_of_write, rows_written, same_size, shape_of, source
from tsa_compile.passes.find.repeat_kv import before_permutation

_PURE = frozenset({"getitem", "slice", "narrow", "arange", "add", "sub"})  # equal arguments, equal results


@dataclasses.dataclass(frozen=True)
class CacheWrite:
    """`buffer[.., positions, ..] = new`: the graph's one write to a cache, before the attention reads it.

    Args:
        buffer: the graph's input that holds the rows.
        layout: its dimensions, such as "bhld": batch, heads, rows, head dim.
        new: the new rows, in the buffer's layout; their batch may be the first rows of the buffer's.
        write: the node that writes. What follows the rows goes right behind it: later, `positions` may be moved on.
        positions: int tensor `[n]`, the row of each new one; or the first row as a number (an int or its node).
        consecutive: proven: each position is the one before plus 1.
    """

    buffer: fx.Node
    layout: str
    new: fx.Node
    write: fx.Node
    positions: fx.Node | int
    consecutive: bool


class KvWrite(NamedTuple):
    """The writes of one attention's keys and values, proven to go to the same rows."""

    keys: CacheWrite
    values: CacheWrite


class CacheWrites:
    """Proves the caches of one graph.

    Args:
        facts: of a graph of Dynamo or `torch.export`, before its writes are made functional.
    """

    def __init__(self, facts: GraphFacts) -> None:
        self._sizes, self._order, self._aliases, self._writers = facts.sizes, facts.order, facts.aliases, facts.writers

    def of(self, k: fx.Node, v: fx.Node, k_layout: str = "bhld", v_layout: str = "bhld") -> KvWrite:
        """The writes behind an attention's operands, before their repetition for grouped queries.

        Raises:
            Unproven: with the reason.
        """
        keys, values = self.one(k, k_layout), self.one(v, v_layout)
        if keys.buffer is values.buffer:
            raise Unproven("keys and values lie in one buffer")
        if not self._same_rows(keys, values):
            raise Unproven("keys and values go to rows that are not proven the same")
        return KvWrite(keys, values)

    def one(self, operand: fx.Node, layout: str = "bhld") -> CacheWrite:
        """The write behind one operand whose dimensions are `layout`."""
        read, layout = self._read(operand, layout)
        buffer = read[-1]
        shared = self._aliases.of([buffer])
        if any(node.op in ("placeholder", "get_attr") and node is not buffer for node in shared):
            raise Unproven(f"{buffer.name} shares its memory with another input")
        writers = [w for w in self._writers if not shared.isdisjoint(writes_to(w))]
        if len(writers) != 1:
            raise Unproven(f"{buffer.name} is written {len(writers)} times in the graph, not once")
        write = writers[0]
        self._check_order(read, write)
        new, index = index_of_write(write, buffer)
        self._check_new(buffer, new)
        positions = rows_written(index, buffer, new, layout.index("l"), self._sizes)
        return CacheWrite(buffer, layout, new, write, positions, self._is_consecutive(positions, new, layout))

    def _read(self, operand: fx.Node, layout: str) -> tuple[list[fx.Node], str]:
        """The nodes from the operand up to the buffer, and the buffer's layout."""
        chain, node = [operand], operand
        while node.op not in ("placeholder", "get_attr"):
            permuted = before_permutation(node, layout)
            if permuted is not None:
                node, layout = permuted
            elif same_value(node) or node in self._writers:
                node = source(node)
            else:
                node = after_slices(node, operand)
            chain.append(node)
        buffer = tensor_of(node)
        if buffer is None or buffer.dim() != len(layout):
            raise Unproven(f"{node.name} is no buffer of {len(layout)} dimensions")
        return chain, layout

    def _check_order(self, read: list[fx.Node], write: fx.Node) -> None:
        """Is nothing of what the attention reads taken before the write?"""
        target = {write}
        stack = list(writes_to(write))
        while stack:  # the slice that is written
            node = stack.pop()
            if node not in target and node is not read[-1]:
                target.add(node)
                stack += node.all_input_nodes[:1]
        for user in {user for node in read for user in node.users} - target:
            if self._order[user] < self._order[write] and not _reads_shape(user):
                raise Unproven(f"{user.name} reads the cache before {write.name} writes it")

    def _check_new(self, buffer: fx.Node, new: Any) -> None:
        old, rows = tensor_of(buffer), tensor_of(new)
        if old is None or rows is None or rows.dim() != old.dim():
            raise Unproven(f"what is written into {buffer.name} has other dimensions than it")
        if rows.dtype != old.dtype:
            raise Unproven(f"{buffer.name} is {old.dtype}, the new rows are {rows.dtype}")

    def _is_consecutive(self, positions: fx.Node | int, new: fx.Node, layout: str) -> bool:
        """A slice, one row, or `arange(n)`, possibly plus one number."""
        if not isinstance(positions, fx.Node) or tensor_of(positions) is None:
            return True
        if same_size(self._sizes, shape_of(new)[layout.index("l")], 1):
            return True
        if not self._aliases.of([positions]).isdisjoint(x for w in self._writers for x in writes_to(w)):
            return False
        if op_name(positions) == "add":
            terms = [_as_made(x) for x in positions.args[:2]]
            plain = "alpha" not in positions.kwargs
            return plain and any(_steps_by_one(a) and _is_one_number(b) for a, b in (terms, terms[::-1]))
        return _steps_by_one(_as_made(positions))

    def _same_rows(self, a: CacheWrite, b: CacheWrite) -> bool:
        x, y = a.positions, b.positions
        if not isinstance(x, fx.Node) or not isinstance(y, fx.Node):
            return isinstance(x, int) and x == y
        if x is not y:
            alike = (x.op, x.target, x.args, x.kwargs) == (y.op, y.target, y.args, y.kwargs)
            if not (alike and op_name(x) in _PURE and self._untouched(x.all_input_nodes, x, y)):
                return False
        return self._untouched([x], x, a.write, b.write) and self._untouched([y], y, a.write, b.write)

    def _untouched(self, nodes: list[fx.Node], *places: fx.Node) -> bool:
        """Does nothing write into these nodes' memory between the first and the last of `places`?"""
        orders = [self._order[node] for node in places]
        between = [w for w in self._writers if min(orders) < self._order[w] < max(orders)]
        return self._aliases.of(n for w in between for n in writes_to(w)).isdisjoint(nodes)


def _as_made(x: Any) -> Any:
    while same_value(x):
        x = x.args[0]
    return x


def _steps_by_one(x: Any) -> bool:
    """Is `x` an `arange` with step 1?"""
    return op_name(x) == "arange" and arg(x, 2, "step", 1) == 1


def _is_one_number(x: Any) -> bool:
    tensor = tensor_of(x)
    return tensor is None or tensor.dim() == 0 or tuple(tensor.shape) == (1,)


def _reads_shape(node: fx.Node) -> bool:
    is_attribute = node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "dtype", "device")
    return is_attribute or op_name(node) in SHAPE_READERS
