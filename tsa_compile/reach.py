"""Can every token depend on every earlier one, under a plan? Reachability over all layers of a model, whatever the data are.

Only what the policies read for certain counts (`Policy.guaranteed`), so the answer is a proof where it is yes. Source: "Locality
Does Not Imply Reachability", arXiv 2606.02680, section 3; `passes/check_reach.py` follows the edges.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tsa_compile.kernels.edges import Edges
from tsa_compile.passes.check_reach import Reach, check_reach, depth_needed
from tsa_compile.passes.site import PHASES, AttentionSite
from tsa_compile.plan import Plan, as_plan
from tsa_compile.policies.base import Policy
from tsa_compile.policies.why_dense import edges_of
from tsa_compile.session import Session

_ROWS = 32  # tokens of the call that finds the attentions; more than a verify step has


@dataclasses.dataclass(frozen=True)
class LayerEdges:
    """What one attention reads for certain.

    Args:
        module: its path.
        policy: the policy's name; "own": the model's own attention.
        edges: what each row reads.
    """

    module: str
    policy: str
    edges: Edges


@dataclasses.dataclass(frozen=True)
class PlanReach:
    """What can depend on what under a plan.

    Args:
        layers: the attentions in order of execution.
        reach: distances by depth and phase, up to the length that was asked for.
        needed: attentions after which every token can depend on every earlier one, the model's own order repeated; None: no
            number of them is enough, as some token never depends on the one before it.
    """

    layers: tuple[LayerEdges, ...]
    reach: Reach
    needed: int | None

    @property
    def distance(self) -> int | None:
        """The smallest distance in tokens that some position cannot look back; None: there is none below the length."""
        hole = self.reach.hole()
        return None if hole is None else hole[0]

    @property
    def pair(self) -> tuple[int, int] | None:
        """(source, target): positions at that distance; whatever changes at the source, the target does not see it."""
        return self.reach.pair()

    def __str__(self) -> str:
        depth, length = len(self.layers), self.reach.length
        names = sorted({layer.policy for layer in self.layers})
        head = f"{depth} attentions ({', '.join(names)}), {length} tokens: "
        if self.pair is None:
            return f"{head}every token can depend on every earlier one, after {self.reach.depth(length - 1)} of them"
        share = f"{self.reach.share(self.distance or 0):.0%} of the positions reach so far"
        more = "no depth is enough" if self.needed is None else f"{self.needed} attentions would be enough"
        source, target = self.pair
        return f"{head}token {target} cannot depend on token {source}, {self.distance} before it ({share}); {more}"


def reach(
    model: nn.Module,
    plan: Policy | Plan | Mapping[str, Any] | None,
    length: int,
    *args: Any,
    phase: str = "prefill",
    **kwargs: Any,
) -> PlanReach:
    """Which earlier tokens can influence a token at all, through all attentions of `model` under `plan`.

    The model is called once, as by `explain`, to find its attentions in order, and left as it was. Their lengths are taken to be
    `length`. For causal language models; of an attention whose mask is not proven nothing is taken for certain.

    Args:
        model: any module.
        plan: what `transform` takes.
        length: tokens of the sequence.
        *args, **kwargs: inputs of the call; without any the model must take `input_ids`, and gets a few.
        phase: under which policies the rows are computed.

    Raises:
        ValueError: a length below 1, an unknown phase, no inputs for a model without `input_ids`, or no attention is found.
    """
    if phase not in PHASES:
        raise ValueError(f"phase must be one of {PHASES}, got {phase!r}")
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    session = Session(model, as_plan(plan))
    with torch.no_grad():
        session(*args, **(kwargs if args or kwargs else _a_few_tokens(model, length)))
    layers = tuple(_layer(session.plan, site, module, length, phase) for site, module in session.backend.attentions())
    if not layers:
        raise ValueError(f"no attention was found in {type(model).__name__}: {session.report.summary()}")
    edges = [layer.edges for layer in layers]
    return PlanReach(layers, check_reach(edges, length), depth_needed(edges, length))


def _layer(plan: Plan, site: AttentionSite, module: str, length: int, phase: str) -> LayerEdges:
    rows = length if phase == "prefill" else site.q_len if phase in ("denoise_first", "denoise") else 1
    site = dataclasses.replace(site, module=module, q_len=rows, k_len=length, past=rows != length, phase=phase)
    policy = plan.policy_for(site)
    return LayerEdges(module, policy.name, edges_of(policy, site))


def _a_few_tokens(model: nn.Module, length: int) -> dict[str, Any]:
    """Inputs of a short call; longer than a sliding window, which a shorter one would not show."""
    known = inspect.signature(model.forward).parameters
    if "input_ids" not in known:
        raise ValueError(f"{type(model).__name__}.forward takes no input_ids: give reach the inputs of a call")
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    window = getattr(config, "sliding_window", None)
    rows = min(length, window) + 1 if isinstance(window, int) else 0
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    ids = torch.zeros(1, max(_ROWS, rows), dtype=torch.long, device=device)
    return {"input_ids": ids} | ({"use_cache": False} if "use_cache" in known else {})
