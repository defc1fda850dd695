"""The measurements of a calibration of `BlockSparse`: each over all prompts, one prompt at a time, each made once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch

from tsa_compile.learn.block_meter import Alphas, BlockMeter, BlockSample
from tsa_compile.learn.block_tables import Tables
from tsa_compile.learn.layer_costs import named
from tsa_compile.learn.state import Measured
from tsa_compile.progress import Advance, Start

Tensor = torch.Tensor


class BlockRun:
    """Samples are means over the prompts; what is in the state is not measured again."""

    def __init__(self, meter: BlockMeter, inputs: list[dict[str, Any]], measured: Measured) -> None:
        self.meter, self.inputs, self.measured = meter, inputs, measured
        self._logits: dict[int, Tensor] = {}

    def tables(self, alphas: Sequence[float], start: Start) -> Tables:
        """Errors and pairs of every list at every alpha."""
        tried, found = tuple(sorted(alphas, reverse=True)), []
        advance = start("each threshold", len(self.inputs))
        for n, given in enumerate(self.inputs):
            found.append(self.measured.get(f"prompt {n}, tables of {tried}", functools.partial(self._tables, given, tried)))
            advance()
        errors, pairs = (torch.tensor(x, dtype=torch.float64).mean(0) for x in zip(*found, strict=True))
        return Tables(tried, errors, pairs, tuple(self.meter.layers), tuple(self.meter.lists), tuple(self.meter.heads))

    def sample(self, alphas: Alphas, advance: Advance) -> BlockSample:
        samples = []
        for n, given in enumerate(self.inputs):
            measure = functools.partial(self._measure, n, given, alphas)
            samples.append(BlockSample(**self.measured.get(f"prompt {n}, {named('alphas', alphas)}", measure)))
            advance()
        return BlockSample(*(sum(field) / len(samples) for field in zip(*map(dataclasses.astuple, samples), strict=True)))

    def alone(self, alphas: Alphas, start: Start) -> dict[str, float]:
        """Loss when that layer alone is sparse."""
        advance = start("each layer alone", len(alphas) * len(self.inputs))
        return {layer: self.sample({layer: alphas[layer]}, advance).loss for layer in alphas}

    def in_context(self, alphas: Alphas, whole: float, start: Start) -> dict[str, float]:
        """What the loss `whole` of all layers falls by when that layer alone is dense."""
        advance = start("each layer dense", len(alphas) * len(self.inputs))
        rest = {layer: {n: a for n, a in alphas.items() if n != layer} for layer in alphas}
        return {layer: whole - self.sample(others, advance).loss for layer, others in rest.items()}

    def _measure(self, n: int, given: dict[str, Any], alphas: Alphas) -> dict[str, float]:
        if n not in self._logits:
            self._logits[n] = self.meter.dense(given)
        return dataclasses.asdict(self.meter.sample(given, self._logits[n], alphas))

    def _tables(self, given: dict[str, Any], alphas: Sequence[float]) -> list[Any]:
        return [x.tolist() for x in self.meter.tables(given, alphas)]
