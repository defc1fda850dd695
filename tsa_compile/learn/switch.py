"""A backend whose layers' coverage can be changed between calls: a candidate plan costs no new trace.

Coverage is a constant argument of each `select_tokens` node. Changing it means to write the node and to generate the graph's
Python code again, milliseconds a layer; tracing anew would take seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx

from tsa_compile.plan import Plan
from tsa_compile.policies.token_sparse import TokenSparse

_ARGUMENTS = [a.name for a in torch.ops.tsa.select_tokens.default._schema.arguments]
_COVERAGE = _ARGUMENTS.index("coverage")


class CoverageSwitch:
    """For `torch.compile(backend=...)`: every site that `policy` takes becomes sparse, with a coverage of its layer's own.

    Attributes:
        layers: layer number -> path of the attention module, for each layer that has a replaced site.
        dense: module -> reason, for the sites that stay dense whatever the plan says.
        executed: the layer of each selection that ran since `set`, in order.
    """

    def __init__(self, policy: TokenSparse) -> None:
        self.layers: dict[int, str] = {}
        self.dense: dict[str, str] = {}
        self.executed: list[int] = []
        self._plan = Plan(policy)
        self._coverage: dict[int, float] = {}
        self._graphs: list[tuple[fx.GraphModule, list[tuple[int, fx.Node]]]] = []

    def set(self, coverage: Mapping[int, float]) -> None:
        """Give each layer its coverage; 0, which keeps every token, to those not named."""
        self._coverage = dict(coverage)
        self.executed.clear()
        for gm, nodes in self._graphs:
            self._write(gm, nodes)

    def _write(self, gm: fx.GraphModule, nodes: list[tuple[int, fx.Node]]) -> None:
        changed = False
        for layer, node in nodes:
            value = float(self._coverage.get(layer, 0.0))
            if node.args[_COVERAGE] != value:
                node.update_arg(_COVERAGE, value)
                changed = True
        if changed:
            gm.recompile()

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        from tsa_compile.passes.pipeline import run_pipeline

        decisions = run_pipeline(gm, self._plan.policy_for, example_inputs=example_inputs).decisions
        self.dense.update({d.site.module: d.reason for d in decisions if d.reason is not None})
        sites = [d.site for d in decisions if d.reason is None]
        selections = gm.graph.find_nodes(op="call_function", target=torch.ops.tsa.select_tokens.default)
        nodes = [(site.layer, node) for site, node in zip(sites, selections, strict=True)]
        self.layers.update({site.layer: site.module for site in sites})
        self._graphs.append((gm, nodes))
        self._write(gm, nodes)
        ran = [layer for layer, _ in nodes]

        def run(*args: Any) -> Any:
            self.executed.extend(ran)
            return gm.forward(*args)

        return run
