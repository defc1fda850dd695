"""`tsa::list_keys` and `tsa::crop_list` on a GPU: the launches of device.py. The contract is docs/operators.md."""

from __future__ import annotations

import torch

from tsa_compile.kernels.common.launcher import launch
from tsa_compile.kernels.common.shares import share_bits
from tsa_compile.kernels.common.sizes import cdiv, next_power_of_2

Tensor = torch.Tensor
BINS = 256  # as the kernels have them
TILE = 8192  # scores of a program at a time
BLOCK = 2048  # weights of a program at a time
FEW_LISTS = 8  # fewer lists are cut into smaller chunks, so that there are programs enough


def crop_list(since: Tensor, begin: Tensor, counts: Tensor, indices: Tensor, k: Tensor, at: Tensor) -> None:
    """`tsa::crop_list`, in one launch."""
    from tsa_compile.kernels.state.listed_keys.device import crop_kernel

    if len(since):
        lists = counts.shape[1]
        tensors, block = (since, begin, counts, at), next_power_of_2(lists)
        launch(crop_kernel, (len(since),), tensors, (lists,), BLOCK=block, num_warps=1)


def list_keys(
    since: Tensor, counts: Tensor, indices: Tensor, scores: Tensor, lse: Tensor, begin: Tensor, keys: int, share: float
) -> None:
    """Nothing waits for the device; no length compiles anything. Scratch: two float32 a key and list."""
    from tsa_compile.kernels.state.listed_keys.device import cut_kernel, weigh_kernel, write_kernel

    (batch, heads, _, length), rows, lists, most = scores.shape, lse.shape[2], counts.shape[1], indices.shape[2]
    group, number = heads // lists, batch * lists
    if number == 0:
        return
    if length == 0:
        counts.zero_()
        since.copy_(begin)
        return
    in_tile = max(2, next_power_of_2(2 * group))
    chunk = 2048 if number < FEW_LISTS else 4096
    chunks = cdiv(length, chunk)
    rank, gathered = torch.empty(2, number, length, dtype=torch.float32, device=scores.device)
    bins = torch.empty(number, chunks, BINS, dtype=torch.int32, device=scores.device)
    cuts = torch.empty(number, 4, dtype=torch.int32, device=scores.device)
    grid, budget = (chunks * number,), (keys, share_bits(share), most)
    launch(
        weigh_kernel, grid, (scores.contiguous(), lse.contiguous(), begin, rank, bins, cuts), (length, rows, group, lists),
        ROWS=in_tile, CHUNK=chunk, BLOCK=max(64, min(chunk, TILE // in_tile)), num_warps=8,
    )  # fmt: skip
    sizes = {"CHUNK": chunk, "BLOCK": BLOCK}
    launch(cut_kernel, grid, (rank, bins, gathered, cuts), (length, *budget), **sizes, num_warps=8)
    tensors = (rank, bins, gathered, cuts, begin, since, counts, indices)
    launch(write_kernel, grid, tensors, (length, lists, *budget), **sizes, num_warps=8)
