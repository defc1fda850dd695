"""Checks of arguments that all operators share. They read shapes and dtypes only, never data."""

from __future__ import annotations

from typing import Any

import torch

Tensor = torch.Tensor
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_HEAD_DIM = 256
BLOCKS = (16, 32, 64, 128)  # tokens of a block
SHARES = ("head", "group")  # whose list of tokens it is: a query head's, or that of all heads of a KV head


def check_attention(name: str, q: Tensor, k: Tensor, v: Tensor | None, key_mask: Tensor | None, causal: bool = True) -> None:
    """Raise a ValueError naming operator `name` and the argument, unless the shapes of docs/operators.md hold."""
    tensors = {"q": q, "k": k} | ({} if v is None else {"v": v})
    for label, x in tensors.items():
        if x.dim() != 4:
            raise ValueError(f"{name}: {label} must be [batch, heads, length, head_dim], got shape {tuple(x.shape)}")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name}: {label} must be float16, bfloat16, float32 or float64, got {x.dtype}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name}: {label} is {x.dtype} on {x.device}, but q is {q.dtype} on {q.device}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{name}: q {tuple(q.shape)} and k {tuple(k.shape)} differ in batch or head dim")
    if v is not None and v.shape[:3] != k.shape[:3]:
        raise ValueError(f"{name}: k {tuple(k.shape)} and v {tuple(v.shape)} differ in batch, heads or length")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{name}: {q.shape[1]} query heads are no multiple of {k.shape[1]} KV heads")
    if causal and q.shape[2] > k.shape[2]:
        raise ValueError(f"{name}: {q.shape[2]} queries for {k.shape[2]} keys; queries are the last positions")
    if not 1 <= q.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(f"{name}: head dim must be 1 to {MAX_HEAD_DIM}, got {q.shape[3]}")
    _check_mask(name, q, k, key_mask)


def _check_mask(name: str, q: Tensor, k: Tensor, key_mask: Tensor | None) -> None:
    if key_mask is None:
        return
    expected = (k.shape[0], k.shape[2])
    if key_mask.dtype != torch.bool or tuple(key_mask.shape) != expected or key_mask.device != q.device:
        raise ValueError(
            f"{name}: key_mask must be bool {expected} on {q.device}, "
            f"got {key_mask.dtype} {tuple(key_mask.shape)} on {key_mask.device}"
        )


def check_selection_arguments(
    name: str, coverage: float, window: int, pool: int, min_tokens: int, heavy: int, share: str
) -> None:
    """Raise a ValueError naming operator `name` and the argument that is outside its range."""
    if not 0 <= coverage < 1:
        raise ValueError(f"{name}: coverage must be in [0, 1), got {coverage}")
    if window < 1 or min_tokens < 1:
        raise ValueError(f"{name}: window and min_tokens must be at least 1, got {window} and {min_tokens}")
    if pool < 1 or pool % 2 == 0:
        raise ValueError(f"{name}: pool must be odd and at least 1, got {pool}")
    if not 0 <= heavy <= min_tokens:
        raise ValueError(f"{name}: heavy must be from 0 to min_tokens ({min_tokens}), got {heavy}")
    if share not in SHARES:
        raise ValueError(f"{name}: share must be one of {SHARES}, got {share!r}")


def check_selection(name: str, q: Tensor, k: Tensor, indices: Tensor, counts: Tensor, heavy_indices: Tensor) -> None:
    """Raise a ValueError naming operator `name`, unless the selection fits `q` and `k`."""
    check_lists(name, q, k, indices, counts)
    if heavy_indices.dtype != torch.int32 or heavy_indices.dim() != 3 or heavy_indices.device != q.device:
        raise ValueError(f"{name}: heavy_indices must be a 3-d int32 tensor on {q.device}, got {heavy_indices.dtype}")
    if heavy_indices.shape[:2] != indices.shape[:2]:
        raise ValueError(f"{name}: heavy_indices {tuple(heavy_indices.shape)} does not fit indices {tuple(indices.shape)}")


def check_lists(name: str, q: Tensor, k: Tensor, indices: Tensor, counts: Tensor) -> None:
    """Raise a ValueError naming operator `name`, unless the lists of kept positions fit `q` and `k`."""
    (batch, heads), (kv_heads, k_len) = q.shape[:2], k.shape[1:3]
    for label, x, dims in (("indices", indices, 3), ("counts", counts, 1)):
        if x.dtype != torch.int32 or x.dim() != dims or x.device != q.device:
            raise ValueError(f"{name}: {label} must be a {dims}-d int32 tensor on {q.device}, got {x.dtype}, {x.dim()}-d")
    lists = indices.shape[1]
    if lists not in (heads, kv_heads):
        raise ValueError(f"{name}: indices has {lists} lists; expected one for each of {heads} heads or {kv_heads} KV heads")
    if tuple(indices.shape) != (batch, lists, k_len) or tuple(counts.shape) != (batch,):
        raise ValueError(f"{name}: indices {tuple(indices.shape)} and counts {tuple(counts.shape)} do not fit the keys")


def check_block_arguments(name: str, block: int, pool: int, mass: float, sinks: int, local: int) -> None:
    """Raise a ValueError naming operator `name` and the argument that is outside its range."""
    if block not in BLOCKS:
        raise ValueError(f"{name}: block must be one of {BLOCKS}, got {block}")
    if pool < 1 or block % pool or block // pool > 16:
        raise ValueError(f"{name}: pool must divide block ({block}) into at most 16 parts, got {pool}")
    if not 0 < mass <= 1:
        raise ValueError(f"{name}: mass must be in (0, 1], got {mass}")
    if sinks < 0 or local < 1:
        raise ValueError(f"{name}: sinks must be at least 0 and local at least 1, got {sinks} and {local}")


def check_blocks(name: str, q: Tensor, k: Tensor, blocks: Tensor, block_counts: Tensor, block: int) -> None:
    """Raise a ValueError naming operator `name`, unless the block lists fit `q` and `k`."""
    if block not in BLOCKS:
        raise ValueError(f"{name}: block must be one of {BLOCKS}, got {block}")
    expected = (*q.shape[:2], -(-k.shape[2] // block))
    if blocks.dtype != torch.int16 or tuple(blocks.shape) != (*expected, expected[2]) or blocks.device != q.device:
        raise ValueError(f"{name}: blocks must be int16 {(*expected, expected[2])}, got {blocks.dtype} {tuple(blocks.shape)}")
    if block_counts.dtype != torch.int32 or tuple(block_counts.shape) != expected or block_counts.device != q.device:
        raise ValueError(f"{name}: block_counts must be int32 {expected}, got {block_counts.dtype} {tuple(block_counts.shape)}")


# ---- one check for each operator, of all its arguments in the order of its schema


def select_tokens(q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float, *numbers: Any, share: str = "head") -> None:
    check_attention("tsa::select_tokens", q, k, None, key_mask)
    check_selection_arguments("tsa::select_tokens", *numbers, share=share)


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, heavy: Tensor, key_mask: Tensor | None, *numbers: Any
) -> None:
    name = "tsa::sparse_attention"
    check_attention(name, q, k, v, key_mask)
    check_selection(name, q, k, indices, counts, heavy)
    check_engine(name, numbers[-1], ("auto", "fused", "packed", "reference"))


def token_sparse_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, *numbers: Any) -> None:
    check_attention("tsa::token_sparse_attention", q, k, v, key_mask)


def select_keys(q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float, coverage: float, probes: int, min_keys: int) -> None:
    name = "tsa::select_keys"
    check_attention(name, q, k, None, key_mask, causal=False)
    if not 0 <= coverage < 1:
        raise ValueError(f"{name}: coverage must be in [0, 1), got {coverage}")
    if probes < 1 or min_keys < 1:
        raise ValueError(f"{name}: probes and min_keys must be at least 1, got {probes} and {min_keys}")


def key_attention(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, scale: float) -> None:
    check_attention("tsa::key_attention", q, k, v, None, causal=False)
    check_lists("tsa::key_attention", q, k, indices, counts)


def select_blocks(q: Tensor, k: Tensor, indices: Tensor, counts: Tensor, scale: float, *numbers: Any) -> None:
    check_attention("tsa::select_blocks", q, k, None, None)
    check_selection("tsa::select_blocks", q, k, indices, counts, indices[..., :0])
    check_block_arguments("tsa::select_blocks", *numbers[:5])


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    heavy: Tensor,
    blocks: Tensor,
    block_counts: Tensor,
    key_mask: Tensor | None,
    scale: float,
    strip_window: int,
    strip_sinks: int,
    block: int,
    engine: str,
) -> None:
    name = "tsa::block_sparse_attention"
    check_attention(name, q, k, v, key_mask)
    check_selection(name, q, k, indices, counts, heavy)
    check_blocks(name, q, k, blocks, block_counts, block)
    check_engine(name, engine, ("auto", "fused", "reference"))


def check_engine(name: str, engine: str, allowed: tuple[str, ...]) -> None:
    """Raise a ValueError naming operator `name`, unless `engine` is one of `allowed`."""
    if engine not in allowed:
        raise ValueError(f"{name}: unknown engine {engine!r}; expected one of {', '.join(allowed)}")


def check_reference_engine(name: str, engine: str) -> None:
    """Raise a RuntimeError naming operator `name` if `engine`, asked for tensors on CPU, needs a GPU."""
    if engine not in ("auto", "reference"):
        raise RuntimeError(f"{name}: engine {engine!r} needs CUDA tensors; on CPU use auto or reference")
