"""Which nodes write memory in place. Dynamo graphs may; a proof, a match and dead-code removal must respect it."""

from __future__ import annotations

import operator

import torch
import torch.fx as fx

from tsa_compile.passes.graph_names import argument, name_of, value_of

_INPLACE_OPERATORS = frozenset(
    {operator.setitem, operator.delitem, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift}
    | {getattr(operator, f"i{n}") for n in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")}
)
_NOT_IN_PLACE = ("and_", "or_", "not_", "is_")  # operator functions whose names end in an underscore
_VIEWS = frozenset(
    {"getitem", "reshape", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "narrow", "to", "flatten",
     "unflatten", "ravel", "diagonal", "movedim", "unfold", "split", "chunk", "unbind", "as_strided", "real", "getattr", "mT", "T"}
)  # fmt: skip


def written_by(node: fx.Node) -> list[fx.Node]:
    """The arguments whose memory `node` writes."""
    if node.op == "call_module":
        return list(node.all_input_nodes)  # unknown code
    if node.op not in ("call_function", "call_method"):
        return []
    if isinstance(node.target, torch._ops.OpOverload):
        arguments = enumerate(node.target._schema.arguments)
        return _nodes(argument(node, i, a.name) for i, a in arguments if a.alias_info and a.alias_info.is_write)
    written = _nodes([node.kwargs.get("out")])
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    suffixed = name.endswith("_") and not name.endswith("__") and name not in _NOT_IN_PLACE
    if node.args and (node.target in _INPLACE_OPERATORS or suffixed or node.kwargs.get("inplace") is True):
        written += _nodes(node.args[:1])
    return written


def _nodes(arguments: object) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(tuple(arguments), found.append)  # type: ignore[arg-type]
    return found


def is_impure(node: fx.Node) -> bool:
    """Whether removing the node, if nothing uses its result, would change what the graph does."""
    return node.is_impure() or bool(written_by(node))


class Writes:
    """Where a graph writes in place, by the memory that is written."""

    def __init__(self, graph: fx.Graph) -> None:
        self._order = {node: i for i, node in enumerate(graph.nodes)}
        self._writers: dict[object, list[fx.Node]] = {}
        for node in graph.nodes:
            for target in written_by(node):
                for memory in _memory(target):
                    self._writers.setdefault(memory, []).append(node)

    def of(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that write memory which `node` may share."""
        return [w for memory in _memory(node) for w in self._writers.get(memory, ())]

    def between(self, node: fx.Node, first: fx.Node, last: fx.Node) -> bool:
        """Whether memory of `node` may be written after `first` and before `last`."""
        return any(self._order[first] < self._order[w] < self._order[last] for w in self.of(node))


def _memory(node: fx.Node) -> set[object]:
    """Names for the memory a node's tensor lives in: its example value's storage, and the nodes it is a view of."""
    names: set[object] = set()
    x = node
    while True:
        names.add(x)
        value = value_of(x)
        if isinstance(value, torch.Tensor):
            names.add(value.untyped_storage()._cdata)
        if name_of(x) not in _VIEWS and not (written_by(x) and x.args):
            return names
        if not isinstance(x.args[0], fx.Node):
            return names
        x = x.args[0]
