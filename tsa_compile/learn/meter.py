"""Measures a candidate plan on one prompt: loss against the dense model, and what each layer keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tsa_compile.check import compare_logits
from tsa_compile.learn.drift import decoder_layer, record_drift
from tsa_compile.parallel import head_group
from tsa_compile.plan import Plan
from tsa_compile.policies.dense import Dense
from tsa_compile.policies.token_sparse import TokenSparse
from tsa_compile.recorder import record_kept
from tsa_compile.session import Session

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

    A layer is named by the path of its attention module.

    Raises:
        RuntimeError: a run did not go through the layers that the plan makes sparse.
    """

    def __init__(self, model: nn.Module, policy: TokenSparse, last: int) -> None:
        self._model, self._last = model, last
        self._group = head_group(model)
        self._widest = Plan(prefill=policy)
        self._session = Session(model, self._widest)
        self.layers: list[str] = []
        self._sites = 0  # that can be sparse, in one call
        self.always_dense: dict[str, str] = {}  # module -> reason, for the sites that no plan makes sparse

    def find_layers(self, inputs: Mapping[str, Any]) -> list[str]:
        """The attention modules that the policy takes, in their order; traces the model once.

        Raises:
            ValueError: there is none; the message has the reasons.
        """
        self._session.plan = self._widest
        with record_kept(self._model) as kept:
            self._predict(self._session, inputs)
        ran = {module for module, _ in kept.by_module()}
        report = self._session.report
        self._sites = len(kept.by_module())
        self.layers = list(dict.fromkeys(s.module for s in report.replaced))
        self.always_dense = {s.module: s.reason for s in report.dense}
        if not self.layers:
            reasons = "; ".join(f"{m or 'site'}: {r}" for m, r in self.always_dense.items())
            raise ValueError(f"no attention site takes the policy ({reasons or 'none was found'})")
        if ran != {*self.layers}:
            raise RuntimeError(f"selections ran in {sorted(ran)}, expected in {sorted(self.layers)}: part of it ran untraced")
        return self.layers

    def dense(self, inputs: Mapping[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """(logits of the last predictions, drift of each layer that has one) of the model as it is."""
        known = dict(self._model.named_modules())
        paths = {layer: decoder_layer(layer) or "" for layer in self.layers}
        with record_drift(self._model, {layer: path for layer, path in paths.items() if path and path in known}) as drift:
            return self._predict(self._model, inputs), drift

    def sample(self, inputs: Mapping[str, Any], dense: Tensor, plan: Plan) -> Sample:
        """The model under a plan that makes some of the layers sparse, as `transform(model, plan)` runs it."""
        self._session.plan = plan
        with record_kept(self._model, self._group) as kept:
            logits = self._predict(self._session, inputs)
        shares = kept.by_module()
        expected, ran = {layer for layer in self.layers if plan.policy_at(layer, "prefill") != Dense()}, {m for m, _ in shares}
        if ran != expected:
            raise RuntimeError(
                f"selections ran in {sorted(ran)}; expected one in each of {sorted(expected)}: part of the model ran untraced"
            )
        found = compare_logits(dense, logits)
        return Sample(found.kl, found.top1, sum(1.0 - share for _, share in shares) / self._sites)

    @torch.no_grad()
    def _predict(self, call: Callable[..., Any], inputs: Mapping[str, Any]) -> Tensor:
        """Logits `[last, vocabulary]` of one prompt."""
        output = call(**inputs)
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if logits is None:
            raise TypeError(f"calibrate needs a model that returns logits or has them as .logits, got {type(output).__name__}")
        return logits[0, -self._last :]
