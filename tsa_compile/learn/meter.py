"""Measures a candidate plan on one prompt: loss against the dense model, and what each layer keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tsa_compile.api import isolated, with_room
from tsa_compile.backend import Backend
from tsa_compile.check import compare_logits
from tsa_compile.learn.drift import decoder_layer, record_drift
from tsa_compile.learn.switch import CoverageSwitch
from tsa_compile.plan import Plan
from tsa_compile.policies.token_sparse import TokenSparse
from tsa_compile.recorder import record_kept

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Sample:
    """One candidate on one prompt: KL(dense || sparse) in nats, share of equal top tokens, mean share of tokens that the
    layers do not keep."""

    kl: float
    top1: float
    sparsity: float


class Meter:
    """Runs one prompt at a time; what is kept of the dense run are the log-probabilities of the last predictions.

    Raises:
        RuntimeError: a run did not go through the layers that were found at first.
    """

    def __init__(self, model: nn.Module, policy: TokenSparse, last: int) -> None:
        self._model, self._last = model, last
        self._switch = CoverageSwitch(policy)
        self._switched = with_room(isolated(model), self._switch)

    def find_layers(self, inputs: Mapping[str, Any]) -> dict[int, str]:
        """Layer number -> path, of the layers that the policy takes; traces the model once.

        Raises:
            ValueError: there is none; the message has the reasons.
        """
        self._predict(self._switched, inputs)
        if not self._switch.layers:
            reasons = "; ".join(f"{m or 'site'}: {r}" for m, r in self._switch.dense.items())
            raise ValueError(f"no attention site takes the policy ({reasons or 'none was found'})")
        return dict(sorted(self._switch.layers.items()))

    @property
    def always_dense(self) -> dict[str, str]:
        """Module -> reason, for the sites that no plan makes sparse."""
        return self._switch.dense

    def dense(self, inputs: Mapping[str, Any]) -> tuple[Tensor, dict[int, float]]:
        """(logits of the last predictions, drift of each layer that has one) of the model as it is."""
        known = dict(self._model.named_modules())
        paths = {layer: decoder_layer(module) or "" for layer, module in self._switch.layers.items()}
        with record_drift(self._model, {layer: path for layer, path in paths.items() if path and path in known}) as drift:
            return self._predict(self._model, inputs), drift

    def candidate(self, inputs: Mapping[str, Any], dense: Tensor, coverage: Mapping[int, float]) -> Sample:
        """The model with these layers sparse, at these coverages, and all others keeping every token."""
        self._switch.set(coverage)
        with record_kept() as kept:
            logits = self._predict(self._switched, inputs)
        shares = kept.shares()
        if len(shares) != len(self._switch.executed) or {*self._switch.executed} != {*self._switch.layers}:
            raise RuntimeError(
                f"{len(shares)} selections ran in layers {sorted(set(self._switch.executed))}; expected one in each of "
                f"{sorted(self._switch.layers)}: part of the model ran untraced (torch._dynamo's recompile limit?)"
            )
        return self._sample(dense, logits, shares, len(shares))

    def plan(self, plan: Plan) -> Callable[[Mapping[str, Any], Tensor], Sample]:
        """A function that measures what `transform(model, plan)` runs, traced for itself."""
        backend = Backend(plan, "eager")
        compiled = with_room(isolated(self._model), backend)

        sites = self._switch.executed
        expected = sum(any(r.modules == layer for r in plan.rules) for layer in sites)

        def measure(inputs: Mapping[str, Any], dense: Tensor) -> Sample:
            with record_kept() as kept:
                logits = self._predict(compiled, inputs)
            shares = kept.shares()
            if len(shares) != expected:
                raise RuntimeError(f"the plan has {expected} sparse sites, but {len(shares)} selections ran")
            return self._sample(dense, logits, shares, len(sites))

        return measure

    def _sample(self, dense: Tensor, logits: Tensor, shares: list[float], sites: int) -> Sample:
        """`sites`: those that could be sparse; the ones without a share keep every token."""
        found = compare_logits(dense, logits)
        return Sample(found.kl, found.top1, sum(1.0 - share for share in shares) / sites)

    @torch.no_grad()
    def _predict(self, call: Callable[..., Any], inputs: Mapping[str, Any]) -> Tensor:
        """Logits `[last, vocabulary]` of one prompt."""
        output = call(**inputs)
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if logits is None:
            raise TypeError(f"calibrate needs a model that returns logits or has them as .logits, got {type(output).__name__}")
        return logits[0, -self._last :]
