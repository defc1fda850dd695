"""The keys of a cache layer that its last verify step listed for drafts (`tsa::list_keys`, `tsa::crop_list`)."""

from __future__ import annotations

import math

import torch

from tsa_compile.cache.kv_state import Field, KvSize, KvState, Tensors
from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa


class ListedKeys(KvState):
    """One list for each batch row and KV head, or batch row, and the row from which on every key is read besides.

    A list is dropped, and every key read, once rows that it was chosen among are others: after a crop behind the verify step,
    or when someone wrote the buffers.

    Args:
        keys: a list has at least as many, if there are so many.
        ratio: and at least this share of them.
        one: for all KV heads together.
    """

    def __init__(self, keys: int, ratio: float, one: bool = False) -> None:
        self.name = f"listed_keys {keys} {ratio}{' one' if one else ''}"
        self.keys, self.ratio, self.one = keys, ratio, one

    def fields(self, size: KvSize) -> tuple[Field, ...]:
        most = min(size.capacity, max(self.keys, math.ceil(self.ratio * size.capacity)))
        lists = (size.batch, 1 if self.one else size.kv_heads)
        return (
            Field("since", (size.batch,), torch.int32),
            Field("begin", (size.batch,), torch.int32),
            Field("counts", lists, torch.int32),
            Field("indices", (*lists, most), torch.int32),
        )

    def begin(self, tensors: Tensors) -> None:
        tensors["since"].zero_()

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
        lists = tensors["since"], tensors["begin"], tensors["counts"], tensors["indices"]
        torch.ops.tsa.crop_list.default(*lists, keys, begin.to(torch.int32))
