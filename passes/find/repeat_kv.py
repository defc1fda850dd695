"""See through what models do to K and V so that grouped-query attention has as many key as query heads."""

from __future__ import annotations

import torch
import torch.fx as fx

from tsa_compile.passes.facts.names import arg, dims_of, is_getitem, op_name, same_value, source, tensor, tensor_of
from tsa_compile.passes.facts.sizes import SizeProver, known_size


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
            return source(x) if plain else None
        if name == "expand":  # one KV head for all
            return source(x) if self._expands_only(source(x), x, head) else None
        if name not in ("view", "flatten"):
            return None
        grouped = _skip_copies(source(x))
        if op_name(grouped) != "expand" or tensor_of(grouped) is None:
            return None
        single = self._before_group_dim(source(grouped), head + 1)
        return single if single is not None and self._is_repetition(single, grouped, x, head) else None

    def _expands_only(self, single: fx.Node, x: fx.Node, head: int) -> bool:
        before, after = tensor_of(single), tensor_of(x)
        if before is None or after is None or before.dim() != 4 or after.dim() != 4:
            return False
        return before.shape[head] == 1 and all(self._same(before, d, after, d) for d in range(4) if d != head)

    def _before_group_dim(self, x: fx.Node, position: int) -> fx.Node | None:
        """What `x` was before a dimension of size 1 was put at `position`, by indexing with None or by unsqueeze."""
        x = self._skip_whole_slices(x)
        rank = tensor(x).dim()
        if op_name(x) == "unsqueeze" and arg(x, 1, "dim") % rank == position:
            return self._skip_whole_slices(source(x))
        if is_getitem(x) and isinstance(x.args[1], tuple):
            keys = x.args[1]
            plain = len(keys) > position and keys[position] is None
            others = [k for n, k in enumerate(keys) if n != position]
            if plain and all(isinstance(k, slice) and k == slice(None) for k in others):
                return source(x)
        return None

    def _skip_whole_slices(self, x: fx.Node) -> fx.Node:
        while op_name(x) == "slice" and arg(x, 4, "step", 1) == 1:
            before, after = tensor(source(x)), tensor(x)
            if not all(self._same(before, d, after, d) for d in range(before.dim())):
                break
            x = source(x)
        return x

    def _is_repetition(self, single: fx.Node, grouped: fx.Node, x: fx.Node, head: int) -> bool:
        """[.., Hk, ..] -> [.., Hk, g, ..] -> [.., Hk * g, ..]"""
        a, b, c = (tensor(n) for n in (single, grouped, x))
        if (a.dim(), b.dim(), c.dim()) != (4, 5, 4):
            return False
        kept = all(self._same(a, d, b, d + (d > head)) for d in range(4))
        flat = all(self._same(a, d, c, d) for d in range(4) if d != head)
        heads, groups, total = (known_size(s) for s in (a.shape[head], b.shape[head + 1], c.shape[head]))
        return kept and flat and self._sizes.is_zero(heads * groups - total)

    def _same(self, a: torch.Tensor, i: int, b: torch.Tensor, j: int) -> bool:
        return self._sizes.same(a.shape[i], b.shape[j])


def _skip_copies(x: fx.Node) -> fx.Node:
    while same_value(x):
        x = source(x)
    return x


def before_permutation(x: fx.Node, layout: str) -> tuple[fx.Node, str] | None:
    """The source of a transpose or permute, and its layout."""
    x = _skip_copies(x)
    if op_name(x) == "transpose":
        a, b = (arg(x, n, f"dim{n - 1}") % 4 for n in (1, 2))
        order = list(range(4))
        order[a], order[b] = order[b], order[a]
    elif op_name(x) == "permute":
        order = [d % 4 for d in dims_of(x)]
    else:
        return None
    example = tensor_of(source(x))
    if example is None or example.dim() != 4:
        return None
    before = [""] * 4
    for position, d in enumerate(order):
        before[d] = layout[position]
    return source(x), "".join(before)
