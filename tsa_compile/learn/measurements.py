"""The measurements of a calibration: each over all prompts, one prompt at a time, each made once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tsa_compile.learn.meter import Meter, Sample
from tsa_compile.learn.search import Step
from tsa_compile.learn.state import Measured
from tsa_compile.plan import Plan
from tsa_compile.policies.dense import Dense
from tsa_compile.policies.token_sparse import TokenSparse
from tsa_compile.progress import Advance
from tsa_compile.rules import Rule

Tensor = torch.Tensor
Inputs = dict[str, Any]


class Run:
    """All measurements of one calibration, each over all prompts, one prompt at a time."""

    def __init__(self, meter: Meter, inputs: list[Inputs], measured: Measured, base: TokenSparse) -> None:
        self.meter, self.inputs, self.measured, self.base = meter, inputs, measured, base

    def drift(self) -> dict[str, float]:
        """Mean over the prompts, of the layers that have one."""
        found = [self._drift(n, given) for n, given in enumerate(self.inputs)]
        common = sorted(set.intersection(*map(set, found)))
        return {layer: sum(one[layer] for one in found) / len(found) for layer in common}

    def _drift(self, n: int, given: Inputs) -> dict[str, float]:
        found: dict[str, float] = self.measured.get(f"drift, prompt {n}", lambda: self.meter.dense(given)[1])
        return found

    def alone(self, steps: list[Step], advance: Advance) -> dict[Step, tuple[float, float]]:
        """(KL, sparsity) with one layer sparse, for each of `steps`."""
        total = dict.fromkeys(steps, (0.0, 0.0))
        for n, given in enumerate(self.inputs):
            dense = functools.cache(functools.partial(self._dense, given))
            for step in steps:
                one = self._sample(n, given, dense, {step.layer: step.coverage})
                kl, sparsity = total[step]
                total[step] = (kl + one.kl / len(self.inputs), sparsity + one.sparsity / len(self.inputs))
                advance()
        return total

    def whole(self, coverage: Mapping[str, float], advance: Advance) -> Sample:
        """Mean over the prompts."""
        samples = []
        for n, given in enumerate(self.inputs):
            dense = functools.cache(functools.partial(self._dense, given))
            samples.append(self._sample(n, given, dense, coverage))
            advance()
        return Sample(*(sum(field) / len(samples) for field in zip(*map(dataclasses.astuple, samples), strict=True)))

    def plan(self, coverage: Mapping[str, float]) -> Plan:
        """These layers sparse, at these coverages, and all others dense."""
        rules = [
            Rule(layer or "*", "prefill", dataclasses.replace(self.base, coverage=c)) for layer, c in sorted(coverage.items())
        ]
        return Plan(prefill=Dense(), rules=tuple(rules))

    def _dense(self, given: Inputs) -> Tensor:
        return self.meter.dense(given)[0]

    def _sample(self, n: int, given: Inputs, dense: Callable[[], Tensor], coverage: Mapping[str, float]) -> Sample:
        steps = " ".join(f"{layer}:{c}" for layer, c in sorted(coverage.items()))
        measure = lambda: dataclasses.asdict(self.meter.sample(given, dense(), self.plan(coverage)))  # noqa: E731
        return Sample(**self.measured.get(f"prompt {n}, {steps}", measure))
