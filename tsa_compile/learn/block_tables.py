"""What `BlockSparse` costs and reads by layer, list and threshold, and the thresholds that make most of a number of pairs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch

from tsa_compile.learn.equal_pairs import cheapest

Tensor = torch.Tensor
ByLayer = dict[str, tuple[float, ...]]  # attention module -> alpha of each query head


@dataclasses.dataclass(frozen=True)
class Tables:
    """Errors and pairs along dense runs, means over prompts.

    Args:
        alphas: descending.
        errors: float64 `[alphas, lists of all layers]`, squared, as shares of the layer's output.
        pairs: of the same shape, shares of the causal ones.
        layers: attention modules, in the order of the columns. lists, heads: of each layer.
    """

    alphas: tuple[float, ...]
    errors: Tensor
    pairs: Tensor
    layers: tuple[str, ...]
    lists: tuple[int, ...]
    heads: tuple[int, ...]

    @property
    def read(self) -> Tensor:
        """float64 `[alphas, lists]`: shares of all heads' pairs, which sum to what is read in all."""
        each = [h / n / sum(self.heads) for h, n in zip(self.heads, self.lists, strict=True) for _ in range(n)]
        return self.pairs * torch.tensor(each, dtype=torch.float64)

    def one(self, share: float) -> ByLayer:
        """One alpha for all, at which `share` of the pairs is read, between the alphas that were tried; logarithms in between."""
        read = self.read.sum(1).tolist()
        after = next((n for n, x in enumerate(read) if x > share), len(read))  # the first that reads too much
        if after in (0, len(read)):
            return self.uniform(self.alphas[0 if after == 0 else -1])
        low, high = read[after - 1], read[after]
        part = (math.log(share) - math.log(low)) / (math.log(high) - math.log(low))
        near, far = (math.log(self.alphas[n]) for n in (after - 1, after))
        return self.uniform(math.exp(near + part * (far - near)))

    def uniform(self, alpha: float) -> ByLayer:
        return {layer: (round(alpha, 6),) * heads for layer, heads in zip(self.layers, self.heads, strict=True)}

    def fit(self, share: float, weight: Mapping[str, float] | None = None) -> ByLayer:
        """An alpha for each list: the least summed error that `share` of the pairs allows.

        Args:
            weight: what an error of each layer counts; None: all alike.
        """
        of_layer = [1.0 if weight is None else weight[layer] for layer in self.layers]
        counts = torch.tensor(of_layer, dtype=torch.float64).repeat_interleave(torch.tensor(self.lists))
        chosen = cheapest(self.errors * counts, self.read, share).tolist()
        return self._spread([self.alphas[n] for n in chosen])

    def errors_at(self, alphas: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """The summed error of each layer at alphas near those that were tried."""
        found, begin = {}, 0
        for layer, lists, heads in zip(self.layers, self.lists, self.heads, strict=True):
            nearest = [self._nearest(a) for a in alphas[layer][:: heads // lists]]
            found[layer] = sum(float(self.errors[n, begin + i]) for i, n in enumerate(nearest))
            begin += lists
        return found

    def _nearest(self, alpha: float) -> int:
        return min(range(len(self.alphas)), key=lambda n: abs(math.log(self.alphas[n] / alpha)))

    def _spread(self, values: list[float]) -> ByLayer:
        """A number for each list -> for each query head, by layer."""
        found, begin = {}, 0
        for layer, lists, heads in zip(self.layers, self.lists, self.heads, strict=True):
            found[layer] = tuple(a for a in values[begin : begin + lists] for _ in range(heads // lists))
            begin += lists
        return found
