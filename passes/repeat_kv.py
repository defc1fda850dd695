"""See through the repetition of KV heads that models write for grouped-query attention."""

from __future__ import annotations

import torch.fx as fx

from tsa_compile.passes.graph_names import argument, is_zero, name_of, same_shape, shape_of, skip_copies


def unrepeat(x: fx.Node) -> fx.Node:
    """The `[B, Hk, L, D]` node behind `repeat_kv` (unsqueeze, expand, reshape) or `repeat_interleave`; else `x` itself."""
    at = skip_copies(x)
    if name_of(at) == "repeat_interleave":
        by_head = argument(at, 2, "dim") in (1, -3) and isinstance(argument(at, 1, "repeats"), int)
        return at.args[0] if by_head and len(shape_of(at)) == 4 else x
    if name_of(at) != "reshape" or len(shape_of(at)) != 4:
        return x
    expanded = skip_copies(at.args[0])
    if name_of(expanded) != "expand" or len(shape_of(expanded)) != 5:
        return x
    source = _before_new_dim(expanded.args[0])
    return source if source is not None and _is_repetition(source, expanded, at) else x


def _before_new_dim(x: fx.Node) -> fx.Node | None:
    """What `x` was before it got a dim of size 1 at position 2, by indexing with None or by unsqueeze."""
    while name_of(x) == "slice" and same_shape(x, x.args[0]):
        x = x.args[0]
    if name_of(x) == "unsqueeze" and argument(x, 1, "dim") in (2, -3):
        source = x.args[0]
    elif name_of(x) == "getitem" and isinstance(x.args[1], tuple) and len(x.args[1]) >= 3:
        index = x.args[1]
        if index[2] is not None or any(i != slice(None) for n, i in enumerate(index) if n != 2):
            return None
        source = x.args[0]
    else:
        return None
    while name_of(source) == "slice" and same_shape(source, source.args[0]):
        source = source.args[0]
    return source


def _is_repetition(source: fx.Node, expanded: fx.Node, flat: fx.Node) -> bool:
    """[B, Hk, L, D] -> [B, Hk, g, L, D] -> [B, Hk * g, L, D]: every head g times in a row."""
    if len(shape_of(source)) != 4:
        return False
    (b, h, n, d), five, four = shape_of(source), shape_of(expanded), shape_of(flat)
    pairs = [*zip((b, h, n, d), (five[0], five[1], five[3], five[4]), strict=True)]
    pairs += zip((b, h * five[2], n, d), four, strict=True)
    return all(is_zero(x - y) for x, y in pairs)
