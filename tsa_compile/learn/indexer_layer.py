"""One attention whose index is trained: second moments first, then its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tsa_compile.cache.head_index import HeadIndex
from tsa_compile.kernels.common.rotation import before_rotation
from tsa_compile.kernels.types import Rotation
from tsa_compile.learn.indexer_loss import divergence, teacher_of
from tsa_compile.learn.indexer_start import start_weights

Tensor = torch.Tensor


class IndexedLayer:
    """The weights of some query heads of one attention, on the device of what it is shown first.

    Args:
        heads: of its query heads, those with an index.
        rotation: of its queries and keys.
        width: numbers of a projection; None: an eighth of the head dim.
        lr: of the optimizer; each update says its own.
    """

    def __init__(self, heads: tuple[int, ...], rotation: Rotation, width: int | None, lr: float) -> None:
        self.heads, self.rotation, self.width, self._lr = heads, rotation, width, lr
        self.group, self.scale = 1, 1.0
        self.moments: tuple[Tensor, Tensor] | None = None  # float64 [heads, D, D] of queries and of keys
        self.query = self.key = torch.empty(0)
        self._optimizer: torch.optim.AdamW | None = None

    def measure(self, q: Tensor, k: Tensor, scale: float) -> None:
        """Add the queries and keys of a text, `[H, L, D]` and `[Hk, L, D]`, rotated."""
        self.group, self.scale = q.shape[0] // k.shape[0], scale
        sums = []
        for x, rows in ((q, self.heads), (k, self.owners)):
            before = self._before(x[list(rows)]).double()
            sums.append(before.mT @ before)
        old = self.moments
        self.moments = (sums[0], sums[1]) if old is None else (old[0] + sums[0], old[1] + sums[1])

    @property
    def owners(self) -> tuple[int, ...]:
        return tuple(h // self.group for h in self.heads)

    def begin(self, init: str) -> None:
        """The first weights, unless there are some."""
        if self._optimizer is not None:
            return
        assert self.moments is not None
        dim = self.moments[0].shape[-1]
        width = min(dim, self.width or max(1, dim // 8))
        made = [start_weights(q, k, width, self.scale, init) for q, k in zip(*self.moments, strict=True)]
        self._take(torch.stack([q for q, _ in made]), torch.stack([k for _, k in made]))

    def update(
        self, q: Tensor, k: Tensor, scale: float, rows: Sequence[Tensor], rates: Sequence[float], mass: float
    ) -> list[Tensor]:
        """An update for each of `rows`; the losses before them."""
        assert self._optimizer is not None
        losses = []
        positions = torch.arange(k.shape[1], device=k.device)
        keys = {g: self._before(k[g]) for g in {*self.owners}}
        for at, rate in zip(rows, rates, strict=True):
            self._optimizer.param_groups[0]["lr"] = rate
            self._optimizer.zero_grad()
            at, total = at.to(k.device), torch.zeros((), device=k.device)
            for n, (h, g) in enumerate(zip(self.heads, self.owners, strict=True)):
                teacher = teacher_of(q[h, at], k[g], at, scale, mass)
                before = self._before(q[h, at], positions[at])
                with torch.enable_grad():
                    loss = divergence(teacher, self.query[n], self.key[n], before, keys[g])
                    loss.backward()
                total += loss.detach()
            self._optimizer.step()
            losses.append(total / len(self.heads))
        return losses

    def index(self) -> HeadIndex:
        return HeadIndex(self.heads, self.group, self.query.detach(), self.key.detach(), self.rotation)

    def state(self) -> dict[str, Any]:
        """All that it has learned, for `load`."""
        optimizer = None if self._optimizer is None else self._optimizer.state_dict()
        told = {"group": self.group, "scale": self.scale, "moments": self.moments, "optimizer": optimizer}
        return {**told, "query": self.query.detach(), "key": self.key.detach()}

    def load(self, state: dict[str, Any]) -> None:
        self.group, self.scale, self.moments = state["group"], state["scale"], state["moments"]
        if state["optimizer"] is not None:
            self._take(state["query"], state["key"])
            assert self._optimizer is not None
            self._optimizer.load_state_dict(state["optimizer"])

    def _take(self, query: Tensor, key: Tensor) -> None:
        with torch.inference_mode(False):
            self.query, self.key = (x.detach().clone().requires_grad_() for x in (query, key))
        self._optimizer = torch.optim.AdamW([self.query, self.key], lr=self._lr, weight_decay=0.01)

    def _before(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """`[.., L, D]` with its rotation undone, float32; positions None: from 0 on."""
        at = torch.arange(x.shape[-2], device=x.device) if positions is None else positions
        frequencies = torch.tensor(self.rotation.frequencies, device=x.device)
        return before_rotation(x.float(), at, frequencies, self.rotation.interleaved, self.rotation.factor)
