"""Pass 8: what must hold of a rewritten graph. A violation is a bug of ours and raises."""

from __future__ import annotations

import operator

import torch
import torch.fx as fx

from tsa_compile.passes.context import Context, Decision, GraphSite
from tsa_compile.passes.facts.mutation import writes_to
from tsa_compile.passes.facts.names import arg, tensor, tensor_of
from tsa_compile.passes.facts.sizes import SizeProver


class VerificationError(RuntimeError):
    """The rewritten graph is not what the passes promise."""


def verify_graph(context: Context) -> int:
    """Check the graph against the decisions; returns the number of `tsa` operators in it.

    Raises:
        VerificationError: a site is gone that was to stay or the reverse, a replacement has another shape or dtype, an
            operator may not appear, or a proven mask did not arrive.
    """
    graph = context.gm.graph
    present, sizes = set(graph.nodes), context.facts.sizes
    for decision in context.decisions:
        _check_presence(decision, present)
    for r in context.replacements:
        _check_result(r.at, r.new, sizes)
        emitted = [n for n in r.created if n in present and _is_ours(n)]
        if not emitted:
            raise VerificationError(f"{r.at}: its policy emitted no tsa operator")
        for node in r.created:
            if node in present:
                _check_operator(r.at, node, r.state)
    return sum(_is_ours(n) for n in graph.nodes)


def _check_presence(decision: Decision, present: set[fx.Node]) -> None:
    if (decision.at.node in present) == (decision.reason is None):
        happened = "is still there" if decision.reason is None else "is gone, but was to stay"
        raise VerificationError(f"{decision.at} {happened}")


def _check_result(at: GraphSite, new: fx.Node, sizes: SizeProver) -> None:
    """The replacement has the shape and dtype of what it replaces."""
    a, b = tensor_of(at.node), tensor_of(new)
    same = a is not None and b is not None and (a.dtype, a.device, a.dim()) == (b.dtype, b.device, b.dim())
    if not same or not all(sizes.same(x, y) for x, y in zip(tensor(at.node).shape, tensor(new).shape, strict=True)):
        was, now = (None if t is None else (t.dtype, list(t.shape)) for t in (a, b))
        raise VerificationError(f"{at}: the output was {was} and is {now}")


def _check_operator(at: GraphSite, node: fx.Node, state: frozenset[fx.Node]) -> None:
    """What is emitted writes the site's own state alone, and operators that take key masks, softcaps and sinks get the site's."""
    target = node.target
    if node.op != "call_function" or not state.issuperset(writes_to(node)):
        raise VerificationError(f"{at}: {node.name} is not a functional operator")
    if not isinstance(target, torch._ops.OpOverload):
        if target not in (operator.getitem, operator.add):
            raise VerificationError(f"{at}: {node.name} calls {target}, which is no registered operator")
        return
    if target.namespace not in ("tsa", "aten"):
        raise VerificationError(f"{at}: {node.name} calls {target}, outside tsa and aten")
    names = [a.name for a in target._schema.arguments]
    for name in ("key_mask", "order"):  # the mask, or the view that was made of it
        if _is_ours(node) and name in names:
            given = arg(node, names.index(name), name)
            if (given is None) == at.site.mask.padded:
                happened = "lost the key mask" if given is None else "got a key mask that was not proven"
                raise VerificationError(f"{at}: {node.name} {happened}")
    if _is_ours(node) and {"softcap", "sinks"}.issubset(names) and "k" in names:
        softcap, sinks = (arg(node, names.index(name), name) for name in ("softcap", "sinks"))
        if (softcap or 0.0) != at.site.softcap or (sinks is not None) != at.site.sinks:
            raise VerificationError(f"{at}: {node.name} got softcap {softcap} and sinks {sinks}, which are not the site's")


def _is_ours(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "tsa"
