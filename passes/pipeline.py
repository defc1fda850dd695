"""The compiler, top to bottom: write out fused calls, find the attentions of a graph, decide, share selections,
keep states beside static caches, rewrite, verify.

Works alike on Dynamo graphs (before AOTAutograd) and on the graph module of an ExportedProgram.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx

import tsa_compile.policies
from tsa_compile.kernels import ops
from tsa_compile.passes.context import Context, PipelineResult
from tsa_compile.passes.decide import decide_policy
from tsa_compile.passes.drop_masks import drop_masks
from tsa_compile.passes.expand import expand_attention
from tsa_compile.passes.find.attention import find_attention
from tsa_compile.passes.keep_states import keep_states
from tsa_compile.passes.rewrite import rewrite_attention
from tsa_compile.passes.share_routes import share_routes
from tsa_compile.passes.site import AttentionSite, Route
from tsa_compile.passes.verify import verify_graph
from tsa_compile.policies.base import Policy

PASSES: tuple[Callable[[Context], int], ...] = (
    expand_attention,
    find_attention,
    decide_policy,
    share_routes,
    keep_states,
    rewrite_attention,
    drop_masks,
    verify_graph,
)
_graph_numbers = itertools.count()


def run_pipeline(
    gm: fx.GraphModule,
    policy_for: Callable[[AttentionSite], Policy],
    *,
    example_inputs: Sequence[Any] | None = None,
    constants: Mapping[str, torch.Tensor] | None = None,
    drafting: bool = False,
    route_for: Callable[[AttentionSite], Route | None] = lambda site: None,
    pays_from: Callable[[Policy, AttentionSite], int | None] = lambda policy, site: 0,
    keeps: bool = False,
) -> PipelineResult:
    """Rewrite `gm` in place.

    Args:
        gm: a graph whose nodes carry example values.
        policy_for: the policy of each site.
        example_inputs: inputs of the graph; written to the dumps.
        constants: tensors whose values are known, by placeholder name. Where a run may change them, as in a live module, the
            caller must see to it that the result's `patterns` still hold.
        drafting: decode steps are drafts, which a verify step will judge.
        route_for: whose selection a site takes; None: its own.
        pays_from: keys from which on a policy is to run at a site; None: at no length.
        keeps: will the caller give the graph the further inputs that the result's `caches` name?

    Raises:
        VerificationError: the result is not what the passes promise (a bug of ours).
    """
    context = Context(gm, policy_for, constants or {}, drafting, route_for, pays_from, keeps)
    dump = _Dump(example_inputs)
    dump.write(gm, "before")
    counts: dict[str, int] = {}
    seconds: dict[str, float] = {}
    for step in PASSES:
        start = time.perf_counter()
        counts[step.__name__] = step(context)
        gm.graph.lint()
        seconds[step.__name__] = time.perf_counter() - start
    dump.write(gm, "after")
    dump.write_decisions(context)
    return PipelineResult(context.decisions, context.patterns, context.warnings, counts, seconds, context.caches)


def pipeline_identity(plan: Mapping[str, Any]) -> str:
    """A hash of the passes', policies' and operators' sources and of the plan: part of the compile cache key."""
    digest = hashlib.sha256(ops.source_tag().encode())
    folders = [Path(__file__).parent, *map(Path, tsa_compile.policies.__path__)]
    for path in sorted(p for folder in folders for p in folder.rglob("*.py")):
        digest.update(path.read_bytes())
    digest.update(json.dumps(plan, sort_keys=True, default=str).encode())
    return digest.hexdigest()


class _Dump:
    """With TSA_DEBUG=folder: each graph before and after the passes, and what was decided."""

    def __init__(self, example_inputs: Sequence[Any] | None) -> None:
        root = os.environ.get("TSA_DEBUG")
        self._inputs = example_inputs
        self._folder = Path(root) / f"graph_{os.getpid()}_{next(_graph_numbers):03d}" if root else None

    def write(self, gm: fx.GraphModule, name: str) -> None:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / f"{name}.py").write_text(gm.print_readable(print_output=False))

    def write_decisions(self, context: Context) -> None:
        if self._folder is None:
            return
        lines = [f"input {n}: {_shape(x)}" for n, x in enumerate(self._inputs or ())]
        lines += [f"{d.site.module} {d.site.form} {d.site.mask}: {d.reason or 'replaced'}" for d in context.decisions]
        (self._folder / "decisions.txt").write_text("\n".join([*lines, *context.warnings]) + "\n")


def _shape(x: Any) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, torch.Tensor) else repr(x)
