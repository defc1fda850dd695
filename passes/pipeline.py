"""The compiler, top to bottom: find the attentions of a graph, decide, rewrite, verify.

Works alike on Dynamo graphs (before AOTAutograd) and on the graph module of an ExportedProgram.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx

from tsa_compile.kernels import ops
from tsa_compile.passes.decide_policy import Decision, decide_policy
from tsa_compile.passes.find_attention import find_attention
from tsa_compile.passes.rewrite_attention import rewrite_attention
from tsa_compile.passes.site import AttentionSite
from tsa_compile.passes.verify_graph import verify_graph
from tsa_compile.policies.base import Policy


@dataclasses.dataclass
class Context:
    """What the passes share: the graph, and what each pass found out."""

    gm: fx.GraphModule
    policy_for: Callable[[AttentionSite], Policy]
    constants: Mapping[str, torch.Tensor]
    sites: list[AttentionSite] = dataclasses.field(default_factory=list)
    decisions: list[Decision] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class PipelineResult:
    """What the passes did: decisions, and a count and a time for each pass."""

    decisions: list[Decision]
    warnings: list[str]
    counts: dict[str, int]
    seconds: dict[str, float]


PASSES: tuple[Callable[[Context], int], ...] = (
    find_attention,
    decide_policy,
    rewrite_attention,
    verify_graph,
)


def run_pipeline(
    gm: fx.GraphModule,
    policy_for: Callable[[AttentionSite], Policy],
    *,
    example_inputs: Sequence[Any] | None = None,
    constants: Mapping[str, torch.Tensor] | None = None,
) -> PipelineResult:
    """Rewrite `gm` in place.

    Args:
        gm: a graph whose nodes carry example values.
        policy_for: the policy of each site.
        example_inputs: of the graph, for the dumps only.
        constants: tensors that cannot change, by placeholder name: an ExportedProgram's, never a live module's buffers.

    Raises:
        VerificationError: the result is not what the passes promise (a bug of ours).
    """
    context = Context(gm, policy_for, constants or {})
    counts: dict[str, int] = {}
    seconds: dict[str, float] = {}
    for number, step in enumerate(PASSES):
        start = time.perf_counter()
        counts[step.__name__] = step(context)
        gm.graph.lint()
        seconds[step.__name__] = time.perf_counter() - start
        _dump(gm, f"{number}_{step.__name__}")
    return PipelineResult(context.decisions, context.warnings, counts, seconds)


def pipeline_identity(plan: Mapping[str, Any]) -> str:
    """A hash of the passes' and policies' sources, the operators and the plan: part of the compile cache key."""
    folder = Path(__file__).parent
    policies = Path(__import__("tsa_compile.policies", fromlist=["policies"]).__path__[0])
    digest = hashlib.sha256(ops.source_tag().encode())
    for path in sorted([*folder.glob("*.py"), *policies.glob("*.py")]):
        digest.update(path.read_bytes())
    digest.update(json.dumps(plan, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:32]


def _dump(gm: fx.GraphModule, name: str) -> None:
    """With TSA_DEBUG=folder: the graph after each pass, a folder for each graph."""
    root = os.environ.get("TSA_DEBUG")
    if not root:
        return
    folder = Path(root) / f"graph_{id(gm):x}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(gm.print_readable(print_output=False))
