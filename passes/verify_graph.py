"""Pass 4: what must hold of a rewritten graph. A violation is a bug of ours and raises."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.fx as fx

from tsa_compile.passes.graph_names import is_zero, shape_of, value_of

if TYPE_CHECKING:
    from tsa_compile.passes.pipeline import Context

_MASK_POSITION = {"tsa::select_tokens": 2, "tsa::sparse_attention": 6, "tsa::token_sparse_attention": 3}


class VerificationError(RuntimeError):
    """The rewritten graph is not what the passes promise."""


def verify_graph(context: Context) -> int:
    """Check the graph against the decisions; returns the number of `tsa` operators in it."""
    operators = [n for n in context.gm.graph.nodes if _schema(n).startswith("tsa::")]
    remaining = set(context.gm.graph.nodes)
    replaced = [d for d in context.decisions if d.reason is None]
    for d in replaced:
        if d.site.node in remaining:
            raise VerificationError(f"site {d.site.index} ({d.site.module}) was to be replaced and is still there")
    for d in context.decisions:
        if d.reason is not None and d.site.node not in remaining:
            raise VerificationError(f"site {d.site.index} ({d.site.module}) was to stay and is gone")
    for node in operators:
        _check_operator(node, [d.site for d in replaced])
    return len(operators)


def _check_operator(node: fx.Node, sites: list) -> None:
    """A site's proven key mask reaches every operator that reads its queries."""
    position = _MASK_POSITION.get(_schema(node))
    if position is None:
        return
    for site in sites:
        if node.args[0] is site.q and site.mask.key_masks and node.args[position] is None:
            raise VerificationError(f"{node.name} lost the padding mask of site {site.index} ({site.module})")


def check_result(old: fx.Node, new: fx.Node) -> None:
    """The replacement has the shape and dtype of what it replaces.

    Raises:
        VerificationError: it has not.
    """
    same = all(is_zero(a - b) for a, b in zip(shape_of(old), shape_of(new), strict=True))
    if not same or value_of(old).dtype != value_of(new).dtype:
        raise VerificationError(
            f"{new.name} gives {value_of(new).dtype} {list(value_of(new).shape)}, "
            f"but {old.name} gave {value_of(old).dtype} {list(value_of(old).shape)}"
        )


def _schema(node: fx.Node) -> str:
    target = node.target
    return target._schema.name if isinstance(target, torch._ops.OpOverload) else ""
