"""See through what models do to K and V so that grouped-query attention has as many key as query heads."""

from __future__ import annotations

import torch.fx as fx

from tsa_compile.passes.facts.names import arg, is_getitem, op_name, same_value, tensor_of
from tsa_compile.passes.facts.sizes import SizeProver, size_expr


class RepeatedHeads:
    """Finds the tensor with the model's own KV heads, head `h` of the repetition being head `h // groups` of it."""

    def __init__(self, sizes: SizeProver) -> None:
        self._sizes = sizes

    def source(self, x: fx.Node, layout: str) -> tuple[fx.Node, str]:
        """(the tensor before repetition, its layout), or the arguments themselves if nothing is repeated."""
        found = self._unrepeated(x, layout.index("h"))
        if found is not None:
            return found, layout
        before = before_permutation(x, layout)  # repeated first, transposed then
        if before is not None:
            found = self._unrepeated(before[0], before[1].index("h"))
            if found is not None:
                return found, before[1]
        return x, layout

    def _unrepeated(self, x: fx.Node, head: int) -> fx.Node | None:
        x = _skip_copies(x)
        name = op_name(x)
        if name == "repeat_interleave":
            plain = isinstance(arg(x, 1, "repeats"), int) and arg(x, 2, "dim") in (head, head - 4)
            return x.args[0] if plain else None  # type: ignore[return-value]
        if name == "expand":  # one KV head for all
            source = x.args[0]
            return source if self._expands_only(source, x, head) else None  # type: ignore[arg-type,return-value]
        if name not in ("view", "flatten"):
            return None
        grouped = _skip_copies(x.args[0])  # type: ignore[arg-type]
        if op_name(grouped) != "expand" or tensor_of(grouped) is None:
            return None
        source = self._before_group_dim(grouped.args[0], head + 1)  # type: ignore[arg-type]
        return source if source is not None and self._is_repetition(source, grouped, x, head) else None

    def _expands_only(self, source: fx.Node, x: fx.Node, head: int) -> bool:
        before, after = tensor_of(source), tensor_of(x)
        if before is None or after is None or before.dim() != 4 or after.dim() != 4:
            return False
        return before.shape[head] == 1 and all(self._same(before, d, after, d) for d in range(4) if d != head)

    def _before_group_dim(self, x: fx.Node, position: int) -> fx.Node | None:
        """What `x` was before a dimension of size 1 was put at `position`, by indexing with None or by unsqueeze."""
        x = self._skip_whole_slices(x)
        rank = tensor_of(x).dim()  # type: ignore[union-attr]
        if op_name(x) == "unsqueeze" and arg(x, 1, "dim") % rank == position:
            return self._skip_whole_slices(x.args[0])  # type: ignore[arg-type]
        if is_getitem(x) and isinstance(x.args[1], tuple):
            keys = x.args[1]
            plain = len(keys) > position and keys[position] is None
            others = [k for n, k in enumerate(keys) if n != position]
            if plain and all(isinstance(k, slice) and k == slice(None) for k in others):
                return x.args[0]  # type: ignore[return-value]
        return None

    def _skip_whole_slices(self, x: fx.Node) -> fx.Node:
        while op_name(x) == "slice" and arg(x, 4, "step", 1) == 1:
            before, after = tensor_of(x.args[0]), tensor_of(x)
            if before is None or not all(self._same(before, d, after, d) for d in range(before.dim())):
                break
            x = x.args[0]  # type: ignore[assignment]
        return x

    def _is_repetition(self, source: fx.Node, grouped: fx.Node, x: fx.Node, head: int) -> bool:
        """[.., Hk, ..] -> [.., Hk, g, ..] -> [.., Hk * g, ..]"""
        a, b, c = (tensor_of(n) for n in (source, grouped, x))
        if a is None or (a.dim(), b.dim(), c.dim()) != (4, 5, 4):  # type: ignore[union-attr]
            return False
        kept = all(self._same(a, d, b, d + (d > head)) for d in range(4))
        flat = all(self._same(a, d, c, d) for d in range(4) if d != head)
        heads, groups, total = (size_expr(s) for s in (a.shape[head], b.shape[head + 1], c.shape[head]))  # type: ignore[union-attr]
        return kept and flat and self._sizes.is_zero(heads * groups - total)  # type: ignore[operator]

    def _same(self, a, i, b, j) -> bool:  # type: ignore[no-untyped-def]
        return self._sizes.is_zero(size_expr(a.shape[i]) - size_expr(b.shape[j]))  # type: ignore[operator]


def _skip_copies(x: fx.Node) -> fx.Node:
    while same_value(x):
        x = x.args[0]  # type: ignore[assignment]
    return x


def before_permutation(x: fx.Node, layout: str) -> tuple[fx.Node, str] | None:
    """The source of a transpose or permute, and its layout."""
    x = _skip_copies(x)
    if op_name(x) == "transpose":
        a, b = (arg(x, n, f"dim{n - 1}") % 4 for n in (1, 2))
        order = list(range(4))
        order[a], order[b] = order[b], order[a]
    elif op_name(x) == "permute":
        dims = x.args[1] if isinstance(x.args[1], (tuple, list)) else x.args[1:]
        order = [d % 4 for d in dims]  # type: ignore[union-attr,operator,misc]
    else:
        return None
    if tensor_of(x.args[0]) is None or tensor_of(x.args[0]).dim() != 4:  # type: ignore[union-attr]
        return None
    source = [""] * 4
    for position, d in enumerate(order):
        source[d] = layout[position]
    return x.args[0], "".join(source)  # type: ignore[return-value]
