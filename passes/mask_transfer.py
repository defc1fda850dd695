"""Transfer functions: what a node's result is, given what is known of its inputs. Unknown operations become `Data`.

`value(node)` never guesses: a rule that does not apply exactly falls through to `Data`, which says only along which dims the
result may vary.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
import torch.fx as fx

from tsa_compile.passes import mask_values as mv
from tsa_compile.passes.graph_names import argument, expression, is_tensor, is_zero, name_of, shape_of, value_of
from tsa_compile.passes.mask_shapes import SHAPE_RULES
from tsa_compile.passes.mutation import Writes
from tsa_compile.passes.mask_values import ALWAYS, Additive, Affine, Data, Never, Truth, Value

HIDDEN_BELOW = -1e4  # an additive mask's value from here down hides a key
_ELEMENTWISE = {
    "add", "sub", "rsub", "mul", "div", "neg", "le", "lt", "ge", "gt", "eq", "ne", "and", "or", "xor", "not", "where", "masked_fill",
    "to", "abs", "floordiv", "floor_divide", "remainder", "mod", "fmod", "clamp", "clamp_min", "clamp_max", "minimum",
    "maximum", "pow", "exp", "log", "isinf", "isneginf", "isnan", "sign",
}  # fmt: skip


class MaskReader:
    """Reads a mask's computation in a graph.

    Args:
        constants: tensors that are part of the program and cannot change (an ExportedProgram's), by node name.
        writes: where the graph writes in place; such memory is data, whatever computed it first.
    """

    def __init__(self, constants: Mapping[str, torch.Tensor], writes: Writes) -> None:
        self.constants = constants
        self.writes = writes
        self._known: dict[fx.Node, Value] = {}

    def value(self, x: Any) -> Value | None:
        """What is known of a node or a number; None for what is no tensor and no number."""
        if not isinstance(x, fx.Node) or not is_tensor(x):
            return number(x)
        if x not in self._known:
            self._known[x] = self._derive(x)
        return self._known[x]

    def _derive(self, node: fx.Node) -> Value:
        name = name_of(node)
        if self.writes.of(node):
            return _all_dims(node)
        if node.name in self.constants:
            return _constant_tensor(node, self.constants[node.name])
        rule = RULES.get(name)
        result = rule(self, node) if rule is not None else None
        if result is not None:
            return _drop_unit_dims(result, node)
        return self._opaque(node, name)

    def _opaque(self, node: fx.Node, name: str) -> Data:
        if name not in _ELEMENTWISE:
            return _all_dims(node)
        known = [self.value(x) for x in node.all_input_nodes if is_tensor(x)]
        varying = frozenset().union(*(v.dims for v in known if v is not None))
        return data(node, varying & _all_dims(node).dims)


def _all_dims(node: fx.Node) -> Data:
    """Anything: it may vary along every dim that has more than one element."""
    return data(node, {-1 - i for i, n in enumerate(reversed(shape_of(node))) if n != 1})


def data(node: fx.Node, dims: Any) -> Data:
    return Data(node, tuple(sorted((d, d) for d in dims)))


def number(x: Any) -> Value | None:
    """A Python number or a SymInt of the graph."""
    if isinstance(x, bool):
        return ALWAYS if x else Never()
    if isinstance(x, float):
        return mv.constant(x)
    e = expression(x)
    return None if e is None else mv.constant(e)


def as_truth(value: Value | None) -> Truth | Never | None:
    """The value as a condition; None if its zeros are not known."""
    if isinstance(value, (Truth, Never)):
        return value
    if isinstance(value, Data) and value_of(value.node).dtype == torch.bool:
        return Truth(frozenset({value}))
    if isinstance(value, Affine) and not value.terms and _is_number(value.const):
        return Never() if value.const == 0 else ALWAYS
    return None


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) or (isinstance(x, sympy.Expr) and x.is_number)


def _as_number(value: Value | None) -> float | None:
    if isinstance(value, Affine) and not value.terms and _is_number(value.const):
        return float(value.const)
    return {ALWAYS: 1.0, Never(): 0.0}.get(value) if isinstance(value, (Truth, Never)) else None


def _drop_unit_dims(value: Value, node: fx.Node) -> Value:
    """Along a dim of size 1 nothing varies."""
    shape = shape_of(node)
    for d in value.dims:
        if -d > len(shape):
            return _all_dims(node)
        if shape[d] == 1:
            value = mv.shift(value, d, 0, 1, keep=False) or value
    return value


def _constant_tensor(node: fx.Node, tensor: torch.Tensor) -> Value:
    """A tensor that is part of the program: one number everywhere, a lower triangle, or data."""
    tensor = torch.as_tensor(tensor)
    if tensor.numel() and bool((tensor == tensor.reshape(-1)[0]).all()):
        return number(tensor.reshape(-1)[0].item()) or data(node, ())
    if tensor.dim() >= 2 and tensor.dtype == torch.bool and bool((tensor == torch.ones_like(tensor).tril()).all()):
        return mv.relation(mv.affine({-1: 1, -2: -1}, sympy.Integer(0)), shape_of(node))
    return _all_dims(node)


# ---- numbers and positions


def _full(fill: Callable[[fx.Node], Any]) -> Callable[[MaskReader, fx.Node], Value | None]:
    def rule(reader: MaskReader, node: fx.Node) -> Value | None:
        x = fill(node)
        value = reader.value(x) if isinstance(x, fx.Node) else number(x)
        if value_of(node).dtype == torch.bool:
            return as_truth(value)
        return value

    return rule


def _arange(reader: MaskReader, node: fx.Node) -> Value | None:
    bounds = [expression(a) for a in node.args]
    if not 1 <= len(bounds) <= 3 or any(b is None for b in bounds) or {"start", "step", "end"} & set(node.kwargs):
        return None
    start = bounds[0] if len(bounds) > 1 else sympy.Integer(0)
    step = bounds[2] if len(bounds) == 3 else sympy.Integer(1)
    return mv.affine({-1: int(step)}, start) if step.is_number else None


def _tensor(reader: MaskReader, node: fx.Node) -> Value | None:
    x = argument(node, 0, "data")
    return number(x) if isinstance(x, (bool, int, float)) else None


def _add(sign: int) -> Callable[[MaskReader, fx.Node], Value | None]:
    def rule(reader: MaskReader, node: fx.Node) -> Value | None:
        if node.kwargs.get("alpha", 1) != 1 or len(node.args) != 2:
            return None
        a, b = (reader.value(x) for x in node.args)
        if isinstance(a, Additive) or isinstance(b, Additive):
            return _add_masks(a, b) if sign == 1 else None
        if isinstance(a, Affine) and isinstance(b, Affine):
            return a.plus(b, sign)
        if sign == -1 and _as_number(a) == 1.0 and isinstance(b, (Truth, Never)):  # 1 - mask
            return mv.negate(b, shape_of(node))
        if isinstance(a, (Truth, Never)) and _as_number(b) == 0.0:
            return a
        return None

    return rule


def _add_masks(a: Value | None, b: Value | None) -> Value | None:
    if isinstance(a, Additive) and isinstance(b, Additive):
        return Additive(a.visible & b.visible)
    if _as_number(b) == 0.0:
        return a
    return b if _as_number(a) == 0.0 else None


def _mul(reader: MaskReader, node: fx.Node) -> Value | None:
    a, b = (reader.value(x) for x in node.args[:2])
    if isinstance(a, (Truth, Never)) and isinstance(b, (Truth, Never)):
        return _conjunction(a, b)
    for x, y in ((a, b), (b, a)):
        factor = _as_number(y)
        if factor is None:
            continue
        if isinstance(x, Affine) and float(factor).is_integer() and x.terms:
            return x.times(sympy.Integer(int(factor)))
        if isinstance(x, Affine) and not x.terms:
            return mv.constant(x.const * factor)
        if isinstance(x, (Truth, Never)) and factor <= HIDDEN_BELOW:  # mask * min: hides where the mask is one
            visible = mv.negate(x, shape_of(node))
            return Additive(visible) if isinstance(visible, Truth) else None
        if factor == 1.0:
            return x
    return None


def _neg(reader: MaskReader, node: fx.Node) -> Value | None:
    x = reader.value(node.args[0])
    return x.times(-1) if isinstance(x, Affine) else None


def _diff(reader: MaskReader, node: fx.Node) -> Value | None:
    """torch.diff of positions: the step, if what is prepended continues them backwards."""
    x, prepend = reader.value(node.args[0]), node.kwargs.get("prepend")
    if argument(node, 1, "n", 1) != 1 or node.kwargs.get("append") is not None or argument(node, 2, "dim", -1) != -1:
        return None
    if not isinstance(x, Affine):
        return None
    step = dict(x.terms).get(-1, 0)
    if prepend is not None:
        before = reader.value(prepend)
        if shape_of(prepend)[-1] != 1 or not isinstance(before, Affine):
            return None
        if before.plus(x, -1) != mv.affine({-1: -step}, sympy.Integer(-step)):
            return None
    return mv.constant(sympy.Integer(step))


def _cumsum(reader: MaskReader, node: fx.Node) -> Value | None:
    x = _as_number(reader.value(node.args[0]))
    return mv.constant(sympy.Integer(0)) if x == 0.0 else None


def _cat(reader: MaskReader, node: fx.Node) -> Value | None:
    """Pieces of one progression, or of one constant, put together again."""
    pieces, dim = node.args[0], argument(node, 1, "dim", 0)
    shape = shape_of(node)
    dim = dim - len(shape) if dim >= 0 else dim
    values = [reader.value(p) for p in pieces]
    if not all(isinstance(v, Affine) for v in values):
        return None
    step = next((dict(v.terms).get(dim, 0) for v in values if dim in v.dims), None)
    if step is None:  # single elements: the step is what lies between the first two
        between = values[1].const - values[0].const if len(values) > 1 else 0
        step = int(between) if getattr(between, "is_Integer", False) else 0
    first, offset = values[0].const, sympy.Integer(0)
    whole = mv.affine({**dict(values[0].terms), dim: step}, first)
    for piece, v in zip(pieces, values, strict=True):
        n = shape_of(piece)[dim]
        expected = mv.affine({d: c for d, c in whole.terms if d != dim or n != 1}, first + step * offset)
        if v.terms != expected.terms or not is_zero(v.const - expected.const):
            return None
        offset = offset + n
    return whole


# ---- conditions


def _compare(name: str) -> Callable[[MaskReader, fx.Node], Value | None]:
    def rule(reader: MaskReader, node: fx.Node) -> Value | None:
        a, b = (reader.value(x) for x in node.args[:2])
        shape = shape_of(node)
        if isinstance(a, (Truth, Never)) and _as_number(b) is not None:
            return _compare_truth(name, a, float(_as_number(b) or 0.0), shape)
        if not isinstance(a, Affine) or not isinstance(b, Affine):
            return None
        if any(isinstance(v.const, float) and not math.isfinite(v.const) for v in (a, b)):
            return None
        difference = a.plus(b, -1)
        if isinstance(difference.const, float) and difference.terms:
            return None
        if not difference.terms and _is_number(difference.const):
            return ALWAYS if getattr(operator, name)(difference.const, 0) else Never()
        return _compare_affine(name, difference, shape)

    return rule


def _compare_affine(name: str, difference: Affine, shape: mv.Shape) -> Value | None:
    one = mv.constant(sympy.Integer(1))
    if name == "le":
        return mv.relation(difference, shape)
    if name == "lt":
        return mv.relation(difference.plus(one), shape)
    if name == "ge":
        return mv.relation(difference.times(-1), shape)
    if name == "gt":
        return mv.relation(one.plus(difference, -1), shape)
    if name == "eq" and not difference.terms and is_zero(difference.const):
        return ALWAYS
    if name == "eq":
        return _conjunction(mv.relation(difference, shape), mv.relation(difference.times(-1), shape))
    return None


def _compare_truth(name: str, a: Truth | Never, b: float, shape: mv.Shape) -> Value | None:
    """A condition, as the numbers 1 and 0, compared with a number."""
    at_one, at_zero = (bool(getattr(operator, name)(x, b)) for x in (1.0, 0.0))
    if at_one == at_zero:
        return ALWAYS if at_one else Never()
    return a if at_one else mv.negate(a, shape)


def _conjunction(a: Truth | Never, b: Truth | Never) -> Truth | Never:
    return a & b if isinstance(a, Truth) and isinstance(b, Truth) else Never()


def _and(reader: MaskReader, node: fx.Node) -> Value | None:
    a, b = (as_truth(reader.value(x)) for x in node.args[:2])
    return None if a is None or b is None else _conjunction(a, b)


def _or(reader: MaskReader, node: fx.Node) -> Value | None:
    a, b = (as_truth(reader.value(x)) for x in node.args[:2])
    if a == ALWAYS or b == ALWAYS:
        return ALWAYS
    if isinstance(a, Never):
        return b
    return a if isinstance(b, Never) else None


def _not(reader: MaskReader, node: fx.Node) -> Value | None:
    x = as_truth(reader.value(node.args[0]))
    return None if x is None else mv.negate(x, shape_of(node))


def _to(reader: MaskReader, node: fx.Node) -> Value | None:
    source = node.args[0]
    x, target = reader.value(source), value_of(node).dtype
    if target == torch.bool and not isinstance(x, (Truth, Never)):
        return as_truth(x)
    if isinstance(x, Data):
        return x if value_of(source).dtype == target else None
    if isinstance(x, Affine) and isinstance(x.const, float) and not target.is_floating_point:
        return None
    return x


# ---- masks that are added


def _choose(cond: Value | None, yes: Value | None, no: Value | None, shape: mv.Shape) -> Value | None:
    """where(cond, yes, no)."""
    truth = as_truth(cond)
    if truth is None:
        return None
    if truth == ALWAYS:
        return yes
    if isinstance(truth, Never):
        return no
    inverse = mv.negate(truth, shape)
    if yes == ALWAYS and isinstance(no, Never):
        return truth
    if isinstance(yes, Never) and isinstance(no, (Truth, Never)):  # where(cond, False, no)
        return _conjunction(inverse, no) if isinstance(inverse, (Truth, Never)) else None
    if isinstance(no, Never) and isinstance(yes, Truth):
        return truth & yes
    for visible, kept, hidden in ((truth, yes, no), (inverse, no, yes)):
        low, kept_number = _as_number(hidden), _as_number(kept)
        if low is None or low > HIDDEN_BELOW or not isinstance(visible, Truth):
            continue
        if kept_number == 0.0:
            return Additive(visible)
        if isinstance(kept, Additive):
            return Additive(kept.visible & visible)
    return None


def _where(reader: MaskReader, node: fx.Node) -> Value | None:
    if len(node.args) != 3:
        return None
    return _choose(*(reader.value(x) for x in node.args), shape_of(node))


def _masked_fill(reader: MaskReader, node: fx.Node) -> Value | None:
    x, cond, fill = (reader.value(argument(node, i, n)) for i, n in enumerate(("input", "mask", "value")))
    return _choose(cond, fill, x, shape_of(node))


def _triangle(upper: bool) -> Callable[[MaskReader, fx.Node], Value | None]:
    def rule(reader: MaskReader, node: fx.Node) -> Value | None:
        x, diagonal = reader.value(node.args[0]), expression(argument(node, 1, "diagonal", 0))
        if diagonal is None:
            return None
        shape, position = shape_of(node), mv.affine({-1: 1, -2: -1}, -diagonal)  # j - i - diagonal
        inside = mv.relation(position.times(-1) if upper else position, shape)
        if isinstance(x, (Truth, Never)):
            return _conjunction(inside, x)
        filled = _as_number(x)
        if filled == 1.0:
            return inside
        if filled is not None and filled <= HIDDEN_BELOW:
            visible = mv.negate(inside, shape)
            return Additive(visible) if isinstance(visible, Truth) else None
        return x if filled == 0.0 else None

    return rule


def _first_of(*names: str) -> Callable[[fx.Node], Any]:
    return lambda node: argument(node, int(names[0]), names[1])


RULES: dict[str, Callable[[MaskReader, fx.Node], Value | None]] = {
    **SHAPE_RULES,
    "arange": _arange,
    "tensor": _tensor,
    "scalar_tensor": _tensor,
    "ones": _full(lambda n: 1),
    "ones_like": _full(lambda n: 1),
    "new_ones": _full(lambda n: 1),
    "zeros": _full(lambda n: 0),
    "zeros_like": _full(lambda n: 0),
    "new_zeros": _full(lambda n: 0),
    "full": _full(_first_of("1", "fill_value")),
    "full_like": _full(_first_of("1", "fill_value")),
    "new_full": _full(_first_of("2", "fill_value")),
    "add": _add(1),
    "sub": _add(-1),
    "mul": _mul,
    "neg": _neg,
    "diff": _diff,
    "cumsum": _cumsum,
    "cat": _cat,
    **{name: _compare(name) for name in ("le", "lt", "ge", "gt", "eq", "ne")},
    "and": _and,
    "or": _or,
    "not": _not,
    "to": _to,
    "where": _where,
    "masked_fill": _masked_fill,
    "tril": _triangle(upper=False),
    "triu": _triangle(upper=True),
}

__all__: Sequence[str] = ("MaskReader", "as_truth", "data", "number")
