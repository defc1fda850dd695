"""One attention whose lookahead index is trained: what it is shown of a text, its weights and their optimizer."""

from __future__ import annotations

from typing import Any

import torch

from tsa_compile.cache.lookahead_index import LookaheadIndex
from tsa_compile.kernels.common.pages import PAGE
from tsa_compile.kernels.types import Rotation
from tsa_compile.learn.lookahead_loss import drawn, focal_loss
from tsa_compile.learn.lookahead_settings import LookaheadTraining

Tensor = torch.Tensor


class LookaheadLayer:
    """The index of one attention, in float32 on the device of what it is shown first; its weights begin at random.

    Args:
        rotation: of the attention's queries and keys.
        training: how it is trained.
        number: of the layer; each has other first weights.
    """

    def __init__(self, rotation: Rotation, training: LookaheadTraining, number: int) -> None:
        self._rotation, self._training, self.number = rotation, training, number
        self.index: LookaheadIndex | None = None
        self._optimizer: torch.optim.AdamW | None = None
        self._seen: tuple[Tensor, Tensor, Tensor] | None = None

    def show(self, q: Tensor, k: Tensor, rows: Tensor) -> None:
        """A text's queries `[H, L, D]` and keys `[Hk, L, D]`, rotated; `rows` are the positions of those that choose."""
        if self.index is None:
            self._take(self._first(q, k))
        means = k[:, : k.shape[1] // PAGE * PAGE].float().unflatten(1, (-1, PAGE)).mean(2)
        self._seen = q[None, :, rows].float(), rows[None], means[None]

    def logits(self) -> Tensor:
        """float32 `[rows, P]` of what was shown last."""
        assert self.index is not None
        assert self._seen is not None
        return self.index.logits(*self._seen)[0]

    def update(self, needed: Tensor, candidates: Tensor, rate: float, generator: torch.Generator) -> float:
        """One update on what was shown last; the loss before it."""
        assert self.index is not None
        assert self._optimizer is not None
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.zero_grad()
        taken = drawn(needed, candidates, self._training.negatives, generator)
        if not taken.any():
            return 0.0
        with torch.enable_grad():
            loss = focal_loss(self.logits(), needed, taken, self._training.gamma)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.index.parameters(), 1.0)
        self._optimizer.step()
        return float(loss.detach())

    def state(self) -> dict[str, Any]:
        """All that it has learned, for `load`."""
        if self.index is None or self._optimizer is None:
            return {"index": None}
        tensors = {name: getattr(self.index, name).detach() for name in self.index.tensors}
        return {"index": tensors, "told": self.index.told(), "optimizer": self._optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        if state["index"] is None:
            return
        self._take(LookaheadIndex.rebuilt(state["told"], state["index"], self._rotation))
        assert self._optimizer is not None
        self._optimizer.load_state_dict(state["optimizer"])

    def _first(self, q: Tensor, k: Tensor) -> LookaheadIndex:
        """Random weights that keep the size of what goes through them."""
        (query_heads, _, dim), kv_heads = q.shape, k.shape[0]
        wide = query_heads * dim
        heads, rank = self._training.heads or query_heads, self._training.rank or max(1, wide // 2)
        if heads % kv_heads:
            raise ValueError(f"LookaheadTraining.heads: {heads}, which {kv_heads} KV heads cannot share evenly")
        generator = torch.Generator().manual_seed(self._training.seed * 1_000_003 + self.number)
        shapes = {"down": (rank, wide), "up": (heads, dim, rank), "weight": (heads, wide)}
        made = {name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5 for name, shape in shapes.items()}
        return LookaheadIndex(kv_heads, **made, offset=torch.zeros(()), rotation=self._rotation).to(q.device)

    def _take(self, index: LookaheadIndex) -> None:
        with torch.inference_mode(False):
            self.index = index.requires_grad_()
        self._optimizer = torch.optim.AdamW(self.index.parameters(), lr=self._training.lr, weight_decay=0.01)
