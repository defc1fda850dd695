"""Small changes of masks that are proven: the source of each hand-made case with one thing altered, and its call altered.

A mutant is a case of mask_cases.py whose reason is None, and one change: of its syntax tree (a comparison, an operator, a
constant, a name), or of what its `sdpa` does with the operands (a hole in the mask, heads in another order, a write in place).
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tests.passes import mask_cases
from tests.passes.mask_cases import CASES, Case, MaskCase
from tests.passes.mask_cases import sdpa as plain_sdpa

_COMPARISONS = (ast.LtE, ast.Lt, ast.GtE, ast.Gt, ast.Eq, ast.NotEq)
_OPERATORS = {
    ast.BitAnd: (ast.BitOr, ast.BitXor),
    ast.Add: (ast.Sub, ast.Mult),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div, ast.Add),
    ast.Div: (ast.Mult,),
    ast.Pow: (ast.Mult,),
    ast.MatMult: (ast.Add,),
}
_NAMES = {"row": "column", "column": "row", "tril": "triu", "triu": "tril", "min": "max", "zeros": "ones", "q": "k", "k": "v"}


_NUMBERS = itertools.count()


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A case and what was changed in it."""

    case: str
    change: str

    @property
    def base(self) -> MaskCase:
        return CASES[self.case]

    def function(self) -> Case:
        kind, _, what = self.change.partition(" ")
        if kind == "call":
            return _compiled(_tree(self.base, "changed_sdpa"), changed_sdpa=_changed_call(CALLS[what]))
        tree = _tree(self.base)
        _, edit = list(_edits(tree))[int(kind)]
        edit()
        return _compiled(tree)


def all_mutants() -> list[Mutant]:
    """Every change of every proven case; many are stillborn (their shapes do not fit)."""
    found = []
    for case in CASES.values():
        if case.reason is not None:
            continue
        found += [Mutant(case.name, f"{n} {text}") for n, (text, _) in enumerate(_edits(_tree(case)))]
        if "sdpa(" in inspect.getsource(case.function):
            found += [Mutant(case.name, f"call {name}") for name in CALLS]
    return found


# ---- changes of the source


def _tree(case: MaskCase, sdpa: str = "sdpa") -> ast.Module:
    tree = ast.parse(textwrap.dedent(inspect.getsource(case.function)).replace("sdpa(", f"{sdpa}("))
    _function(tree).decorator_list = []
    return tree


def _function(tree: ast.Module) -> ast.FunctionDef:
    (function,) = tree.body
    assert isinstance(function, ast.FunctionDef)
    return function


def _compiled(tree: ast.Module, **names: object) -> Case:
    """The function of the tree, in a module of its own, since Dynamo looks globals up in the module they are named after."""
    module = types.ModuleType(f"tsa_mutant_{next(_NUMBERS)}")
    vars(module).update({**vars(mask_cases), **names, "__name__": module.__name__})
    exec(compile(ast.fix_missing_locations(tree), "<mutant>", "exec"), vars(module))
    sys.modules[module.__name__] = module
    made: Case = getattr(module, _function(tree).name)
    return made


def _edits(tree: ast.Module) -> Iterator[tuple[str, Callable[[], None]]]:
    """(what it changes, an edit of `tree` in place), in the order of the source. A tree takes one edit and is parsed anew for the
    next: `deepcopy` follows what other libraries hang on the nodes that all trees of a process share (`ast.Load()`)."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.arg):
            for text, field, value in _edits_of(node):
                yield f"line {getattr(node, 'lineno', 0)}: {text}", functools.partial(setattr, node, field, value)


def _edits_of(node: ast.AST) -> Iterator[tuple[str, str, object]]:
    """(what changes, the node's field, its new value)"""
    if isinstance(node, ast.Compare):
        for op in _COMPARISONS:
            if not isinstance(node.ops[0], op):
                yield f"{type(node.ops[0]).__name__} -> {op.__name__}", "ops", [op()]
    elif isinstance(node, ast.BinOp):
        for op in _OPERATORS.get(type(node.op), ()):
            yield f"{type(node.op).__name__} -> {op.__name__}", "op", op()
    elif isinstance(node, ast.UnaryOp):
        yield f"without {type(node.op).__name__}", "op", ast.UAdd() if isinstance(node.op, ast.USub) else ast.Not()
    elif isinstance(node, ast.Constant):
        yield from ((f"{node.value!r} -> {new!r}", "value", new) for new in _other_constants(node.value))
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in _NAMES:
        yield f"{node.id} -> {_NAMES[node.id]}", "id", _NAMES[node.id]
    elif isinstance(node, ast.Attribute) and node.attr in _NAMES:
        yield f"{node.attr} -> {_NAMES[node.attr]}", "attr", _NAMES[node.attr]


def _other_constants(value: object) -> tuple[object, ...]:
    if isinstance(value, bool):
        return (not value,)
    if isinstance(value, (int, float)):
        return (value + 1, value - 1, value + 2)
    others: dict[object, tuple[object, ...]] = {"-inf": ("inf", "-5", "-1e3", "-1e5"), None: (0,)}
    return others.get(value, ())


# ---- changes of the call: each takes (q, k, v, mask, options) and gives the same, changed

Call = tuple[Tensor, Tensor, Tensor, "Tensor | None", "dict[str, object]"]
Change = Callable[[Tensor, Tensor, Tensor, Tensor, "dict[str, object]"], Call]
CALLS: dict[str, Change] = {}


def _call(change: Change) -> Change:
    CALLS[change.__name__] = change
    return change


def _changed_call(change: Change) -> Callable[..., Tensor]:
    def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
        if mask is None:
            mask, options = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(), {}
        q, k, v, mask, options = change(q, k, v, mask, options)
        return plain_sdpa(q, k, v, mask, **options)

    return sdpa


def _without(mask: Tensor, hidden: Tensor) -> Tensor:
    """`mask` less the entries `hidden`, in the mask's own way of hiding."""
    return mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, float("-inf"))


def _mask_change(change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: dict[str, object]) -> Call:
        return q, k, v, change(mask, q, k), options

    CALLS[change.__name__] = call
    return change


def _columns(k: Tensor) -> Tensor:
    return torch.arange(k.shape[2])


@_mask_change
def a_key_hidden(mask, q, k):
    return _without(mask, _columns(k) == 2)


@_mask_change
def every_other_key_hidden(mask, q, k):
    return _without(mask, _columns(k) % 2 == 1)


@_mask_change
def first_keys_hidden(mask, q, k):
    return _without(mask, _columns(k) < 1)


@_mask_change
def last_key_hidden(mask, q, k):
    return _without(mask, _columns(k) >= k.shape[2] - 1)


@_mask_change
def a_query_sees_less(mask, q, k):
    return _without(mask, (torch.arange(q.shape[2])[:, None] == 6) & (_columns(k) > 2))


@_mask_change
def a_head_sees_less(mask, q, k):
    return _without(mask, (torch.arange(q.shape[1])[:, None, None] == 1) & (_columns(k) == 1))


@_mask_change
def a_batch_row_sees_less(mask, q, k):
    return _without(mask, (torch.arange(q.shape[0])[:, None, None, None] == 1) & (_columns(k) == 1))


@_mask_change
def keys_hidden_by_data(mask, q, k):
    return _without(mask, (k[:, :1, :, 0] > 1.0)[:, :, None])


@_mask_change
def keys_hidden_by_data_of_heads(mask, q, k):
    return _without(mask, (k[:, :, :, 0] > 1.0).repeat_interleave(q.shape[1] // k.shape[1], 1)[:, :, None])


@_mask_change
def queries_hidden_by_data(mask, q, k):
    return _without(mask, (q[:, :1, :, :1] > 0.5) & (_columns(k) == 0))


@_mask_change
def pairs_hidden_by_data(mask, q, k):
    return _without(mask, (q[:, :1, :, :1] * k[:, :1, None, :, 0] > 0.5) & (_columns(k) > 0))


@_mask_change
def shifted_right(mask, q, k):
    return mask.roll(1, -1)


@_mask_change
def shifted_down(mask, q, k):
    return mask.roll(1, -2) if mask.shape[-2] > 1 else mask


@_mask_change
def keys_reversed(mask, q, k):
    return mask.flip(-1)


@_mask_change
def both_axes_reversed(mask, q, k):
    return mask.flip(-1, -2)


@_mask_change
def axes_swapped(mask, q, k):
    return mask.mT


@_mask_change
def first_row_for_all(mask, q, k):
    return mask[..., -1:, :]


@_mask_change
def first_column_for_all(mask, q, k):
    return mask[..., :1]


@_mask_change
def rows_gathered(mask, q, k):
    return mask[..., (torch.arange(q.shape[2]) * 3) % q.shape[2], :]


@_mask_change
def written_in_place(mask, q, k):
    mask = mask.clone()
    mask[..., 3:, 1] = False if mask.dtype == torch.bool else float("-inf")
    return mask


@_mask_change
def filled_in_place(mask, q, k):
    mask = mask.expand(q.shape[0], 1, q.shape[2], k.shape[2]).clone()
    return mask.masked_fill_(_columns(k) == 4, False if mask.dtype == torch.bool else float("-inf"))


@_mask_change
def as_a_bias_of_numbers(mask, q, k):
    return mask.to(q.dtype)  # a bool mask becomes 0 and 1, which are added


@_mask_change
def distance_bias(mask, q, k):
    bias = (torch.arange(q.shape[2])[:, None] - _columns(k)) * -0.1
    return bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else mask + bias


@_mask_change
def inverted(mask, q, k):
    return ~mask if mask.dtype == torch.bool else -mask


@_call
def heads_tiled(q, k, v, mask, options):
    groups = q.shape[1] // k.shape[1]
    return q, k.repeat(1, groups, 1, 1), v.repeat(1, groups, 1, 1), mask, options


@_call
def keys_tiled_values_repeated(q, k, v, mask, options):
    groups = q.shape[1] // k.shape[1]
    return q, k.repeat(1, groups, 1, 1), v.repeat_interleave(groups, 1), mask, options


@_call
def heads_grouped_from_the_other_side(q, k, v, mask, options):
    groups = q.shape[1] // k.shape[1]
    k, v = (x[:, None].expand(-1, groups, -1, -1, -1).reshape(x.shape[0], -1, *x.shape[2:]) for x in (k, v))
    return q, k, v, mask, options


@_call
def keys_rolled(q, k, v, mask, options):
    return q, k.roll(1, 2), v, mask, options


@_call
def values_reversed(q, k, v, mask, options):
    return q, k, v.flip(2), mask, options


@_call
def keys_overwritten(q, k, v, mask, options):
    k = k.clone()
    k[:, :, :2] = 0.5
    return q, k, v, mask, options


@_call
def mask_overwritten_after(q, k, v, mask, options):
    seen = mask.clone()
    mask = seen.clone()
    seen.fill_(False if seen.dtype == torch.bool else 0.0)
    return q, k, v, mask, options


@_call
def scale_of_the_wrong_sign(q, k, v, mask, options):
    return q, k, v, mask, {**options, "scale": -0.25}


@_call
def scale_from_data(q, k, v, mask, options):
    return q * k.abs().mean(), k, v, mask, options


@_call
def another_scale(q, k, v, mask, options):
    return q, k, v, mask, {**options, "scale": 0.7}


@_call
def dropout_on(q, k, v, mask, options):
    return q, k, v, mask, {**options, "dropout_p": 0.5}
