"""Which part of a buffer a write writes, or a read reads: index tuples and slices, of Dynamo and of ATen graphs."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from tsa_compile.passes.facts.mutation import writes_to
from tsa_compile.passes.facts.names import arg, is_getitem, op_name, tensor_of
from tsa_compile.passes.facts.sizes import SizeProver, size_expr

WHOLE = slice(None)


class Unproven(Exception):
    """The reason why an operand is not proven to be a static cache."""


def after_slices(node: fx.Node, operand: fx.Node) -> fx.Node:
    """What `node` was sliced from: the first rows of some dimensions, in their order.

    Raises:
        Unproven: the node is anything else.
    """
    if is_getitem(node) and isinstance(node.args[0], fx.Node):
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        first_rows = all(is_prefix(entry) for entry in index)
    elif op_name(node) == "slice":
        first_rows = is_prefix(_aten_slice(node))
    else:
        first_rows = op_name(node) == "narrow" and arg(node, 2, "start") == 0
    if first_rows:
        return source(node)
    raise Unproven(f"{operand.name} is computed ({op_name(node)}), not read from a buffer")


def source(node: fx.Node) -> fx.Node:
    """The node that this one is a view, a copy or a write of."""
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node):
        raise Unproven(f"{node.name} ({op_name(node)}) is made of no tensor of the graph")
    return first


def shape_of(x: Any) -> torch.Size:
    tensor = tensor_of(x)
    if tensor is None:
        raise Unproven(f"{x} has no example value")
    return tensor.shape


def same_size(sizes: SizeProver, a: Any, b: Any) -> bool:
    """Are two sizes proven to be equal?"""
    x, y = size_expr(a), size_expr(b)
    return x is not None and y is not None and sizes.is_zero(x - y)


def is_prefix(entry: Any) -> bool:
    """`:`, or `:end` with an end that does not count from behind."""
    if not isinstance(entry, slice) or entry.step not in (None, 1) or entry.start not in (None, 0):
        return False
    return not (isinstance(entry.stop, int) and entry.stop < 0)


def index_of_write(write: fx.Node, buffer: fx.Node) -> tuple[Any, list[Any]]:
    """(new rows, index of each dimension of the buffer): a slice, or the node of an int tensor."""
    name = op_name(write)
    rank = len(shape_of(buffer))
    if name in ("setitem", "index_put_"):
        if name == "index_put_" and arg(write, 3, "accumulate", False) is not False:
            raise Unproven(f"{write.name} adds to the rows")
        index, new = write.args[1], write.args[2]
        return new, _of_view(write.args[0], buffer, _entries(index, rank, write))
    if name == "index_copy_":
        entries: list[Any] = [WHOLE] * rank
        entries[arg(write, 1, "dim") % rank] = arg(write, 2, "index")
        return arg(write, 3, "source"), _of_view(write.args[0], buffer, entries)
    if name == "copy_":
        return write.args[1], _of_view(write.args[0], buffer, [WHOLE] * rank)
    raise Unproven(f"{write.name} ({name}) writes {writes_to(write)[0].name} in a way that is not known")


def rows_written(index: list[Any], buffer: fx.Node, new: fx.Node, dim: int, sizes: SizeProver) -> fx.Node | int:
    """The positions: an int tensor `[n]`, or the first row as a number. All other dimensions must be written from 0 on.

    Args:
        index: of each dimension.
        buffer: what is written.
        new: the new rows.
        dim: the dimension of the rows.
        sizes: of the graph.
    """
    shape, held = shape_of(new), shape_of(buffer)
    for d, entry in enumerate(index):
        if d == dim:
            continue
        if not is_prefix(entry):
            raise Unproven(f"dimension {d} of the buffer is not written from its first entry on")
        length = held[d] if entry.stop is None else entry.stop
        if not same_size(sizes, length, shape[d]):
            raise Unproven(f"what is written is broadcast along dimension {d}")
    rows = index[dim]
    if isinstance(rows, fx.Node):
        positions = tensor_of(rows)
        if positions is None or positions.dim() != 1 or positions.dtype not in (torch.int32, torch.int64):
            raise Unproven(f"{rows.name} is no vector of positions")
        if not same_size(sizes, positions.shape[0], shape[dim]):
            raise Unproven("one new row is written to several positions")
        return rows
    begin = 0 if rows.start is None else rows.start
    first, end, new_rows = size_expr(begin), size_expr(held[dim] if rows.stop is None else rows.stop), size_expr(shape[dim])
    if rows.step not in (None, 1) or first is None or not sizes.at_most_zero(-first):
        raise Unproven(f"rows from {begin} on are not proven to be counted from the first")
    if end is None or new_rows is None or not sizes.is_zero(end - first - new_rows):
        raise Unproven("the new rows are not as many as the slice that they are written to")
    return begin


def _entries(index: Any, rank: int, write: fx.Node) -> list[Any]:
    """One entry for each dimension of the buffer."""
    entries = list(index) if isinstance(index, (tuple, list)) else [index]
    if op_name(write) == "index_put_":
        entries = [WHOLE if entry is None else entry for entry in entries]
    if Ellipsis in [e for e in entries if not isinstance(e, (fx.Node, slice))]:
        at = next(n for n, e in enumerate(entries) if e is Ellipsis)
        entries[at : at + 1] = [WHOLE] * (rank - len(entries) + 1)
    entries += [WHOLE] * (rank - len(entries))
    if len(entries) != rank or not all(isinstance(e, (slice, fx.Node)) for e in entries):
        raise Unproven(f"{write.name} indexes the buffer by {index}")
    if sum(isinstance(e, fx.Node) for e in entries) > 1:
        raise Unproven(f"{write.name} indexes more than one dimension by tensors")
    return entries


def _of_view(view: Any, buffer: fx.Node, entries: list[Any]) -> list[Any]:
    """`entries` of a slice of the buffer, as entries of the buffer. Each dimension may be indexed once."""
    entries = list(entries)
    while view is not buffer:
        if is_getitem(view):
            outer = _entries(view.args[1], len(entries), view)
        elif op_name(view) == "slice":
            outer = [WHOLE] * len(entries)
            outer[arg(view, 1, "dim", 0)] = _aten_slice(view)
        elif op_name(view) == "narrow":
            start, length = arg(view, 2, "start"), arg(view, 3, "length")
            outer = [WHOLE] * len(entries)
            if not isinstance(start, int) or not isinstance(length, int):
                raise Unproven(f"{view.name} begins at a number that is not a constant")
            outer[arg(view, 1, "dim") % len(entries)] = slice(start, start + length)
        else:
            raise Unproven(f"the write goes through {view.name} ({op_name(view)})")
        for d, entry in enumerate(outer):
            if entry != WHOLE and entries[d] != WHOLE:
                raise Unproven(f"dimension {d} of the buffer is indexed twice")
            entries[d] = entry if entry != WHOLE else entries[d]
        view = view.args[0]
    return entries


def _aten_slice(node: fx.Node) -> slice:
    """The slice of an `aten.slice` node, whole where it is written with the largest end."""
    start, stop, step = arg(node, 2, "start", None), arg(node, 3, "end", None), arg(node, 4, "step", 1)
    whole = start in (None, 0) and (stop is None or (isinstance(stop, int) and stop >= 2**62)) and step == 1
    return WHOLE if whole else slice(start, stop, step)
