"""What predicts, from one query, the pages that the next steps will need: the retriever of lookahead sparse attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tsa_compile.cache.learned_index import LearnedIndex, learned
from tsa_compile.kernels.common.rotation import before_rotation
from tsa_compile.kernels.types import Rotation

Tensor = torch.Tensor


class LookaheadIndex(LearnedIndex):
    """The query side of FlashMemory's retriever (arXiv 2606.09079), for one attention:

        I[p] = sigmoid(offset + sum_h w_h relu(q_h . k[p])),  c = RMSNorm(down x),  q_h = RoPE(up_h c),  w = weight x / sqrt(n D)

    Ours: `x` are the attention's own queries before rotation, of all heads, RMS-normalised (in the paper the hidden state);
    `k[p]` is the mean key of page `p` (in the paper a key of the model's own index); the offset, in the paper set by hand, is
    learned.

    Args:
        kv_heads: of the attention; they share the `n` heads of the index evenly.
        down: `[r, H D]`, of the query heads together.
        up: `[n, D, r]`.
        weight: `[n, H D]`.
        offset: `[]`.
        rotation: of queries and keys (RoPE).

    Raises:
        ValueError: shapes that do not fit each other.
    """

    kind = "lookahead"
    tensors = ("down", "up", "weight", "offset")
    down: Tensor
    up: Tensor
    weight: Tensor
    offset: Tensor

    def __init__(self, kv_heads: int, down: Tensor, up: Tensor, weight: Tensor, offset: Tensor, rotation: Rotation) -> None:
        fits = (down.dim(), up.dim(), offset.dim()) == (2, 3, 0) and up.shape[2] == down.shape[0] and up.shape[0] % kv_heads == 0
        if not fits or weight.shape != (up.shape[0], down.shape[1]) or down.shape[1] % up.shape[1]:
            shapes = ", ".join(str(tuple(x.shape)) for x in (down, up, weight, offset))
            raise ValueError(f"weights of a lookahead index must be [r, H D], [n, D, r], [n, H D] and [], got {shapes}")
        if not 1 <= 2 * len(rotation.frequencies) <= up.shape[1]:
            raise ValueError(f"{len(rotation.frequencies)} pairs are rotated, of a head dim of {up.shape[1]}")
        super().__init__(rotation, {"down": down, "up": up, "weight": weight, "offset": offset})
        self.kv_heads = kv_heads

    def logits(self, q: Tensor, positions: Tensor, means: Tensor) -> Tensor:
        """float32 `[B, n, P]`, before the sigmoid.

        Args:
            q: `[B, H, n, D]`, rotated, of rows at `positions`, int `[B or 1, n]`.
            means: `[B, Hk, P, D]`, the mean keys of pages, rotated as the keys are.
        """
        down, up, weight = (x.float() for x in (self.down, self.up, self.weight))
        at, turn = positions[:, None], (self.interleaved, self.factor)
        x = before_rotation(q.float(), at, self.frequencies, *turn).transpose(1, 2).flatten(2)  # [B, n, H D]
        x = F.rms_norm(x, x.shape[-1:])
        code = F.rms_norm(x @ down.mT, down.shape[:1])
        asked = torch.einsum("bnr,hdr->bhnd", code, up)
        asked = before_rotation(asked, at, -self.frequencies, self.interleaved, 1 / self.factor)  # undone the other way round
        hits = torch.relu(asked.unflatten(1, (self.kv_heads, -1)) @ means.float()[:, :, None].mT).flatten(1, 2)  # [B, h, n, P]
        shares = x @ weight.mT * (up.shape[0] * up.shape[1]) ** -0.5
        return torch.einsum("bnh,bhnp->bnp", shares, hits) + self.offset.float()

    def told(self) -> dict[str, Any]:
        return {"kv_heads": self.kv_heads}

    @classmethod
    def rebuilt(cls, told: Mapping[str, Any], weights: Mapping[str, Tensor], rotation: Rotation) -> LookaheadIndex:
        down, up, weight, offset = (weights[name] for name in cls.tensors)
        return cls(int(told["kv_heads"]), down, up, weight, offset, rotation)


def lookaheads(model: nn.Module) -> dict[int, LookaheadIndex]:
    """The indexes that a model has, by the number of the layer in its cache."""
    found = {}
    for _, module, index in learned(model):
        if isinstance(index, LookaheadIndex):
            number: Any = module.layer_idx
            found[int(number)] = index
    return found
