"""The seed of a cache layer, from which sampled values (`tsa::sampled_value_attention`) draw."""

from __future__ import annotations

import torch

from tsa_compile.cache.kv_state import Field, KvSize, KvState, Tensors
from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa

LIMIT = (1 << 63) - 1


class SampleSeed(KvState):
    """An int64 from torch's generator on the CPU (`torch.manual_seed`), another one for each layer and request.

    Batch rows share it, and count themselves: a row that was copied goes on with other draws.
    """

    name = "sample_seed"

    def fields(self, size: KvSize) -> tuple[Field, ...]:
        return (Field("seed", (size.batch,), torch.int64),)

    def begin(self, tensors: Tensors) -> None:
        tensors["seed"].fill_(int(torch.randint(LIMIT, (), device="cpu")))

    def append(
        self,
        tensors: Tensors,
        keys: torch.Tensor,
        values: torch.Tensor,
        begin: torch.Tensor,
        end: torch.Tensor,
        key_mask: torch.Tensor | None,
        new: int,
    ) -> None:
        torch.ops.tsa.attach_state.default(tensors["seed"], keys)
