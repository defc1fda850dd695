"""What is known about a graph as a whole, worked out once and handed from pass to pass."""

from __future__ import annotations

from functools import cached_property

import torch.fx as fx

from tsa_compile.passes.facts.mutation import Aliases, writes_to
from tsa_compile.passes.facts.sizes import SizeProver


class GraphFacts:
    """Facts of a graph as `find_attention` meets it. `sizes` also holds of what later passes make of the graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self.sizes = SizeProver(graph)

    @cached_property
    def order(self) -> dict[fx.Node, int]:
        """The place of each node."""
        return {node: n for n, node in enumerate(self._graph.nodes)}

    @cached_property
    def aliases(self) -> Aliases:
        """Which nodes may share memory."""
        return Aliases(self._graph)

    @cached_property
    def writers(self) -> list[fx.Node]:
        """The nodes that write in place."""
        return [node for node in self._graph.nodes if writes_to(node)]

    @cached_property
    def written(self) -> frozenset[fx.Node]:
        """All nodes that may share memory with one that is written in place somewhere."""
        return self.aliases.of(x for node in self.writers for x in writes_to(node))
