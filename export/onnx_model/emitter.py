"""A small emitter of standard ONNX operators: `op.Add(x, 1)` appends a node and returns its output."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tsa_compile.export.common import require

if TYPE_CHECKING:
    import onnx_ir as ir

FLOAT, INT64, BOOL, DOUBLE = 1, 7, 9, 11  # onnx.TensorProto data types


class Ops:
    """Nodes of the default domain, in the order they are emitted.

    `op.<OperatorName>(*inputs, **attributes)` takes values, None (an absent optional input), Python numbers (int: int64
    scalar, float: float32 scalar) and lists of ints (int64, 1-D). An operator with several outputs gives its first;
    `op.outputs(n, ...)` gives `n`.
    """

    def __init__(self, opset: int, names: Iterator[int] | None = None) -> None:
        self._ir = require("onnx_ir", "onnx")
        self._tape = require("onnx_ir.tape", "onnx").Tape()
        self._names = names or itertools.count()  # inner graphs share it: names are unique in the whole function
        self._made: dict[Any, Sequence[ir.Value]] = {}
        self.opset = opset

    def __getattr__(self, op_type: str) -> Callable[..., ir.Value]:
        if not op_type[:1].isupper():
            raise AttributeError(op_type)
        return lambda *inputs, **attributes: self.outputs(1, op_type, *inputs, **attributes)[0]

    def outputs(self, count: int, op_type: str, *inputs: Any, **attributes: Any) -> Sequence[ir.Value]:
        """A node with `count` outputs; asked again for the same node, the first one's."""
        operands = self._values(inputs)
        key = (op_type, tuple(id(x) for x in operands), repr(sorted(attributes.items())))
        if key not in self._made:
            values = [self._ir.Value(name=f"v{next(self._names)}") for _ in range(count)]
            name = f"{op_type}_{values[0].name}"
            self._made[key] = self._tape.op_multi_out(op_type, operands, attributes, outputs=values, name=name)
        return self._made[key]

    def plugin(self, count: int, op_type: str, inputs: Sequence[ir.Value], **attributes: str) -> Sequence[ir.Value]:
        """A node of domain "tsa" with `count` outputs; each attribute is the function's attribute of the name given."""
        types = self._ir.AttributeType
        given = {
            name: self._ir.RefAttr(name, of, types.FLOAT if name == "scale" else types.INT) for name, of in attributes.items()
        }
        given["plugin_namespace"] = "tsa"
        values = [self._ir.Value(name=f"v{next(self._names)}") for _ in range(count)]
        return self._tape.op_multi_out(op_type, inputs, given, outputs=values, domain="tsa", name=f"{op_type}_{values[0].name}")

    def attribute(self, name: str, kind: str) -> ir.Value:
        """The value of the function's attribute `name`; `kind` is "int", "float" or "tensor"."""
        target = {"int": "value_int", "float": "value_float", "tensor": "value"}[kind]
        return self.Constant(**{target: self._ir.RefAttr(target, name, getattr(self._ir.AttributeType, kind.upper()))})

    def constant(self, value: float | Sequence[float]) -> ir.Value:
        """An int64 or float32 constant, scalar or 1-D."""
        one = value if isinstance(value, (int, float)) else value[0]
        kind = "int" if isinstance(one, int) else "float"
        return self.Constant(**{f"value_{kind}": value} if one is value else {f"value_{kind}s": value})

    def loop(self, trips: int, initial: Sequence[ir.Value], body: Callable[..., Sequence[ir.Value]]) -> Sequence[ir.Value]:
        """`trips` rounds of `body(op, round, *carried) -> carried`; values of this graph may be read inside."""
        ir, inner = self._ir, Ops(self.opset, self._names)
        scalar = ir.Shape(())
        step = ir.Value(name=f"v{next(self._names)}", type=ir.TensorType(ir.DataType.INT64), shape=scalar)
        go = ir.Value(name=f"v{next(self._names)}", type=ir.TensorType(ir.DataType.BOOL), shape=scalar)
        carried = [ir.Value(name=f"v{next(self._names)}") for _ in initial]
        results = list(body(inner, step, *carried))
        graph = inner.graph([step, go, *carried], [inner.Identity(go), *results], "rounds")
        return self.outputs(len(initial), "Loop", trips, self.Cast(1, to=BOOL), *initial, body=graph)

    def graph(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], name: str) -> ir.Graph:
        """Everything emitted so far as a graph."""
        return self._ir.Graph(inputs, outputs, nodes=self._tape.nodes, opset_imports={"": self.opset}, name=name)

    def _values(self, inputs: Sequence[Any]) -> list[ir.Value | None]:
        return [x if x is None or isinstance(x, self._ir.Value) else self.constant(x) for x in inputs]
