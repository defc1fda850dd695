"""Pass 5: static caches of other code, to which the model itself writes, and what policies keep beside them (`Policy.states`).

A cache of ours keeps page sums and the like as its layers append rows. Of a model's own cache the graph is all there is: where
`find/cache_write` proves its one write, the state becomes an input of the graph, and follows the new row right before the
attention reads. Whoever runs the graph keeps one state for each pair of buffers, and has `made_anew` run where someone else has
written into them since.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses import FakeTensor

from tsa_compile.cache.kv_state import PAGE, KvSize, KvState
from tsa_compile.passes.context import Context, Decision, GraphSite, KeptCache
from tsa_compile.passes.emit import describe_new
from tsa_compile.passes.facts.names import meta_key, tensor, tensor_of
from tsa_compile.passes.find.cache_index import Unproven
from tsa_compile.passes.find.cache_write import CacheWrites, KvWrite
from tsa_compile.passes.find.state import state_of
from tsa_compile.passes.operands import LAYOUT

aten = torch.ops.aten
OWN = "static cache of the model's own"


def keep_states(context: Context) -> int:
    """Say of each replaced decode step that it reads a static cache, and what is kept beside it; returns how many do."""
    writes, pages, found = CacheWrites(context.facts), _Pages(context), 0
    for n, decision in enumerate(context.decisions):
        if decision.reason is not None or decision.site.phase not in ("decode", "draft"):
            continue
        kinds = () if decision.anchor is not None else decision.policy.states()
        if kinds and state_of(context.gm.graph, decision.at) is not None:
            continue  # a cache of ours
        named = " and ".join(kind.name.replace("_", " ") for kind in kinds)
        kept = None
        try:
            write = _proven(context, writes, decision.at)
            found += 1
            if kinds:
                kept = _kept(context, decision.at, write, kinds, pages)
            remark = OWN if kept is None else f"{OWN}, {named} kept beside it"
        except Unproven as why:
            remark = f"{named} not kept between steps: {why}" if kinds else ""
        context.decisions[n] = dataclasses.replace(decision, kept=kept, remark=remark)
    return found


def follow(graph: fx.Graph, decision: Decision, key_mask: fx.Node | None) -> None:
    """At the insertion point, bring what is kept up to date with the new row. `key_mask`: bool `[B, capacity]`, or None."""
    kept, match = decision.kept, decision.at.match
    if kept is None:
        return
    tracer = fx.proxy.GraphAppendingTracer(graph)

    def proxy(node: fx.Node) -> Any:
        return fx.Proxy(node, tracer)

    mask = None if key_mask is None else proxy(key_mask)
    for kind in kept.kinds:
        tensors: Any = {field: proxy(node) for (name, field), node in kept.inputs.items() if name == kind.name}
        kind.append(tensors, proxy(match.k), proxy(match.v), proxy(kept.begin), proxy(kept.end), mask, 1)


def made_anew(gm: fx.GraphModule, caches: Sequence[KeptCache]) -> fx.GraphModule:
    """A copy of a rewritten graph that makes the states of all its caches anew, from every row."""
    names = {node.name for kept in caches for node in kept.inputs.values()}
    capacity = {node.name: kept.size.capacity for kept in caches for node in kept.inputs.values()}
    graph = copy.deepcopy(gm.graph)
    for node in list(graph.nodes):
        if not isinstance(node.target, torch._ops.OpOverload) or not node.args or getattr(node.args[0], "name", "") not in names:
            continue
        at = {argument.name: n for n, argument in enumerate(node.target._schema.arguments)}
        if "begin" not in at:
            continue  # it reads the state
        rows = capacity[node.args[0].name]
        with graph.inserting_before(node):
            first = graph.call_function(aten.zeros_like.default, (node.args[at["begin"]],))
            last = graph.call_function(aten.full_like.default, (node.args[at["end"]], rows // PAGE * PAGE))
        for name, value in (("begin", first), ("end", last), ("new", rows)):
            node.update_arg(at[name], value)
    return fx.GraphModule(gm, graph)


def _proven(context: Context, writes: CacheWrites, at: GraphSite) -> KvWrite:
    match = at.match
    write = writes.of(match.k, match.v, match.layouts.k, match.layouts.v)
    for buffer in (write.keys.buffer, write.values.buffer):
        if buffer.name not in context.constants:
            raise Unproven(f"{buffer.name} is no buffer of a module, or is one whose writes PyTorch does not count")
    return write


def _kept(context: Context, at: GraphSite, write: KvWrite, kinds: tuple[KvState, ...], pages: _Pages) -> KeptCache:
    """The inputs for the states of one cache, and where its new row lies."""
    if not context.keeps:
        raise Unproven("whoever runs the graph keeps nothing between calls")
    size = _size(at, write)
    for kind in kinds:
        fields = kind.fields(size)
        if kind.remembered or not fields or any(field.rows != PAGE for field in fields):
            raise Unproven(f"{kind.name} is not told by the rows of a page alone")
    begin, end = pages.of(write, size)
    graph, like = context.gm.graph, write.keys.buffer
    inputs: dict[tuple[str, str], fx.Node] = {}
    for kind in kinds:
        for field in kind.fields(size):
            last = graph.find_nodes(op="placeholder")[-1]
            with graph.inserting_after(last):
                node = graph.placeholder(f"tsa_state_{at.site.index}_{len(inputs)}")
            example = tensor(like)
            assert isinstance(example, FakeTensor)
            with example.fake_mode:
                node.meta[meta_key(like)] = torch.empty(field.shape, dtype=field.dtype, device=size.device)
            node.meta["tensor_dict"] = dict(like.meta.get("tensor_dict", {}))
            inputs[kind.name, field.name] = node
    kept = KeptCache(like.name, write.values.buffer.name, size, kinds, inputs, begin, end)
    context.caches.append(kept)
    return kept


def _size(at: GraphSite, write: KvWrite) -> KvSize:
    keys, values = tensor(write.keys.buffer), tensor(write.values.buffer)
    if not write.keys.layout == write.values.layout == at.match.layouts.k == LAYOUT:
        raise Unproven("rows are not the third dimension of its buffers")
    if tensor(at.match.k).shape != keys.shape or tensor(at.match.v).shape != values.shape:
        raise Unproven("the attention reads a part of its buffers")
    if not all(isinstance(n, int) for n in (*keys.shape, *values.shape)):
        raise Unproven("the size of its buffers varies")
    positions = tensor_of(write.keys.positions)
    if positions is None or tuple(positions.shape) != (1,):
        raise Unproven("the place of its new row is no tensor of one number")
    return KvSize.of(keys, values, keys.shape[2])


class _Pages:
    """Emits, in one graph, where the page of a new row begins and ends: once for all caches that go by the same positions."""

    def __init__(self, context: Context) -> None:
        self._written = context.facts.written
        self._known: dict[tuple[Any, int, int], tuple[fx.Node, fx.Node]] = {}

    def of(self, write: KvWrite, size: KvSize) -> tuple[fx.Node, fx.Node]:
        """`begin` and `end`, int32 `[B]`, read right behind the write, as positions may move on later.

        The page's sum is made of all its rows at every step, whichever of them was written, and wherever the next one goes.
        """
        positions = write.keys.positions
        key = (positions, size.batch, size.capacity)
        found = self._known.get(key) or self._emit(write.keys.write, positions, size)
        if positions not in self._written:
            self._known[key] = found
        return found

    def _emit(self, write: fx.Node, positions: Any, size: KvSize) -> tuple[fx.Node, fx.Node]:
        last, made = write.next, []

        def then(operator: Any, *args: Any) -> fx.Node:
            with write.graph.inserting_before(last):
                made.append(write.graph.call_function(operator, args))
            return made[-1]

        counted = then(aten.remainder.Scalar, positions, size.capacity)  # -1: the last row
        first = then(aten.to.dtype, then(aten.bitwise_and.Scalar, counted, -PAGE), torch.int32)
        begin = then(aten.repeat.default, first, [size.batch])
        end = then(aten.clamp.default, then(aten.add.Scalar, begin, PAGE), None, size.capacity // PAGE * PAGE)
        for new in made:
            describe_new(new, positions)
        return begin, end
