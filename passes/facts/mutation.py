"""Which nodes hold memory that something in the graph writes to. A Dynamo graph may write in place; proofs must not."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Iterable

import torch
import torch.fx as fx
from torch._subclasses import FakeTensor

from tsa_compile.passes.facts.names import op_name, source, tensor_of

# fmt: off
_VIEWS = frozenset({
    "getitem", "view", "view_as", "reshape_as", "transpose", "permute", "t", "T", "mT", "getattr", "expand",
    "expand_as", "broadcast_to", "slice", "select", "unsqueeze", "squeeze", "narrow", "detach", "alias", "to",
    "type_as", "contiguous", "cpu", "cuda", "flatten", "unflatten", "ravel", "diagonal", "movedim", "moveaxis",
    "unfold", "split", "chunk", "unbind", "split_with_sizes", "tensor_split", "as_strided", "lift_fresh",
    "lift", "real", "view_as_real",
})
_INPLACE_OPERATORS = frozenset({
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod,
    operator.ipow, operator.imatmul, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift,
})
# fmt: on
_INPLACE_METHODS = frozenset(f"__{o.__name__}__" for o in _INPLACE_OPERATORS)


def writes_to(node: fx.Node) -> list[fx.Node]:
    """The argument nodes whose memory `node` writes."""
    written = _nodes(node.kwargs.get("out"))
    if node.op == "call_method":
        name = str(node.target)
        if (name.endswith("_") and not name.endswith("__")) or name in _INPLACE_METHODS:
            written.append(source(node))
    elif node.op == "call_function":
        written += _function_writes(node)
    elif node.op == "call_module":
        written += node.all_input_nodes
    return written


def _nodes(x: object) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(x, found.append)  # type: ignore[arg-type,type-var]
    return found


def _function_writes(node: fx.Node) -> list[fx.Node]:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        arguments = target._schema.arguments
        values = [node.args[i] if i < len(node.args) else node.kwargs.get(a.name) for i, a in enumerate(arguments)]
        written = []
        for argument, value in zip(arguments, values, strict=True):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written += [x for x in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(x, fx.Node)]
        return written
    if isinstance(target, torch._ops.HigherOrderOperator):
        return [] if _bodies_are_pure(node) else node.all_input_nodes
    name = getattr(target, "__name__", "")
    inplace = (
        target in _INPLACE_OPERATORS
        or name in _INPLACE_METHODS
        or (name.endswith("_") and not name.endswith("__") and name not in ("and_", "or_"))
    )
    if (inplace or _asked_inplace(node)) and node.args and isinstance(node.args[0], fx.Node):
        return [node.args[0]]
    return []


def _asked_inplace(node: fx.Node) -> bool:
    """Is the function's argument `inplace` given, by name or in its place, and not known to be False?"""
    position = _inplace_position(node.target)
    given = node.args[position] if position is not None and len(node.args) > position else node.kwargs.get("inplace", False)
    return given is not False and given is not None


@functools.cache
def _inplace_position(function: object) -> int | None:
    """Where the function takes `inplace`; None: nowhere."""
    try:
        names = list(inspect.signature(function).parameters) if callable(function) else []
    except ValueError:  # built in, without a signature
        return None
    return names.index("inplace") if "inplace" in names else None


def _bodies_are_pure(node: fx.Node) -> bool:
    """Has a higher-order operator bodies, none of which writes in place?"""
    owner = node.graph.owning_module
    bodies = [x for x in node.all_input_nodes if x.op == "get_attr" and owner is not None]
    modules = [getattr(owner, str(x.target), None) for x in bodies]
    graphs = [m.graph for m in modules if isinstance(m, fx.GraphModule)]
    return bool(graphs) and not any(writes_to(x) for graph in graphs for x in graph.nodes)


class Aliases:
    """Which nodes of a graph may share memory: by the storage of their example values, or as views of each other."""

    def __init__(self, graph: fx.Graph) -> None:
        self._sharing: dict[object, list[fx.Node]] = {}
        for node in graph.nodes:
            self._sharing.setdefault(_storage(node), []).append(node)

    def of(self, nodes: Iterable[fx.Node]) -> frozenset[fx.Node]:
        """`nodes` and all that may share memory with one of them."""
        found: set[fx.Node] = set()
        stack = list(nodes)
        while stack:
            node = stack.pop()
            if node in found:
                continue
            found.add(node)
            stack += self._sharing[_storage(node)]
            if may_alias_input(node) and node.args and isinstance(node.args[0], fx.Node):
                stack.append(node.args[0])
            stack += [user for user in node.users if may_alias_input(user) and user.args and user.args[0] is node]
        return frozenset(found)


def _storage(node: fx.Node) -> object:
    """What identifies the memory of the node's example value; the node itself if that is not known."""
    tensor = tensor_of(node)
    if (
        tensor is None
        or type(tensor) not in (torch.Tensor, FakeTensor)
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    ):
        return node
    return tensor.untyped_storage()._cdata


def may_alias_input(node: fx.Node) -> bool:
    """May the result share memory with the first argument?"""
    return op_name(node) in _VIEWS or bool(writes_to(node))
