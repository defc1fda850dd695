"""Checks of arguments that all operators share. They read shapes and dtypes only, never data."""

from __future__ import annotations

import torch

from tsa_compile.kernels.types import Keys, Operands, Strip, TokenRule, Tokens

Tensor = torch.Tensor
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_HEAD_DIM = 256
MAX_SELECTED_FROM = 1 << 24  # tokens of a row: selection counts them in fields of 24 bits
SHARES = ("head", "group")  # whose list of tokens it is: a query head's, or that of all heads of a KV head


def check_operands(name: str, x: Operands, causal: bool = True) -> None:
    """As `check_attention`, and that the view, if there is one, is what `tsa::key_view` makes."""
    check_attention(name, x.q, x.k, x.v, x.key_mask, causal)
    order, ranks = x.view.order
    if (order is None) != (ranks is None):
        raise ValueError(f"{name}: order and ranks come together from tsa::key_view, got one of them")
    for label, t in (("order", order), ("ranks", ranks)):
        expected = (x.k.shape[0], x.k.shape[2])
        if t is not None and (t.dtype != torch.int32 or tuple(t.shape) != expected or t.device != x.q.device):
            got = f"{t.dtype} {tuple(t.shape)} on {t.device}"
            raise ValueError(f"{name}: {label} must be int32 {expected} on {x.q.device}, got {got}")


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


def check_selected_from(name: str, k: Tensor) -> None:
    """Raise a ValueError naming operator `name`, unless the kernels can count the keys of a row."""
    if k.shape[2] >= MAX_SELECTED_FROM:
        raise ValueError(f"{name}: a row must have fewer than {MAX_SELECTED_FROM} keys, got {k.shape[2]}")


def check_rule(name: str, rule: TokenRule, share: str) -> None:
    """Raise a ValueError naming operator `name` and the argument that is outside its range."""
    coverage, last_queries, pool, min_tokens, heavy = rule
    if not 0 <= coverage < 1:
        raise ValueError(f"{name}: coverage must be in [0, 1), got {coverage}")
    if last_queries < 1 or min_tokens < 1:
        raise ValueError(f"{name}: window and min_tokens must be at least 1, got {last_queries} and {min_tokens}")
    if pool < 1 or pool % 2 == 0:
        raise ValueError(f"{name}: pool must be odd and at least 1, got {pool}")
    if not 0 <= heavy <= min_tokens:
        raise ValueError(f"{name}: heavy must be from 0 to min_tokens ({min_tokens}), got {heavy}")
    if share not in SHARES:
        raise ValueError(f"{name}: share must be one of {SHARES}, got {share!r}")


def check_tokens(name: str, q: Tensor, k: Tensor, kept: Tokens) -> None:
    """Raise a ValueError naming operator `name`, unless the selection fits `q` and `k`."""
    indices, counts, heavy_indices = kept
    check_lists(name, q, k, indices, counts)
    if heavy_indices.dtype != torch.int32 or heavy_indices.dim() != 3 or heavy_indices.device != q.device:
        raise ValueError(f"{name}: heavy_indices must be a 3-d int32 tensor on {q.device}, got {heavy_indices.dtype}")
    if heavy_indices.shape[:2] != indices.shape[:2]:
        raise ValueError(f"{name}: heavy_indices {tuple(heavy_indices.shape)} does not fit indices {tuple(indices.shape)}")


def check_lists(name: str, q: Tensor, k: Tensor, indices: Tensor, counts: Tensor, capacity: int | None = None) -> None:
    """Raise a ValueError naming operator `name`, unless the lists of kept positions fit `q` and `k`.

    Args:
        capacity: entries of a list; None: one for each key.
    """
    (batch, heads), (kv_heads, k_len) = q.shape[:2], k.shape[1:3]
    for label, x, dims in (("indices", indices, 3), ("counts", counts, 1)):
        if x.dtype != torch.int32 or x.dim() != dims or x.device != q.device:
            raise ValueError(f"{name}: {label} must be a {dims}-d int32 tensor on {q.device}, got {x.dtype}, {x.dim()}-d")
    lists = indices.shape[1]
    if lists not in (heads, kv_heads):
        raise ValueError(f"{name}: indices has {lists} lists; expected one for each of {heads} heads or {kv_heads} KV heads")
    if tuple(indices.shape) != (batch, lists, k_len if capacity is None else capacity) or tuple(counts.shape) != (batch,):
        raise ValueError(f"{name}: indices {tuple(indices.shape)} and counts {tuple(counts.shape)} do not fit the keys")


# ---- one check for each operator, of what arguments.py makes of its arguments


def materialize(x: Tensor) -> None:
    """Any tensor will do."""


def key_view(key_mask: Tensor) -> None:
    if key_mask.dtype != torch.bool or key_mask.dim() != 2:
        raise ValueError(f"tsa::key_view: key_mask must be bool [batch, keys], got {key_mask.dtype} {tuple(key_mask.shape)}")


def select_tokens(x: Operands, scale: float, rule: TokenRule, share: str) -> None:
    check_operands("tsa::select_tokens", x)
    check_selected_from("tsa::select_tokens", x.k)
    check_rule("tsa::select_tokens", rule, share)


def sparse_attention(
    x: Operands, kept: Tokens, scale: float, strip: Strip, dense_below: int, engine: str, need_lse: bool
) -> None:
    name = "tsa::sparse_attention"
    check_operands(name, x)
    check_tokens(name, x.q, x.k, kept)
    check_engine(name, engine, ("auto", "fused", "packed", "reference"))


def token_sparse_attention(x: Operands, scale: float, rule: TokenRule, strip: Strip, engine: str) -> None:
    check_operands("tsa::token_sparse_attention", x)


def select_keys(x: Operands, scale: float, coverage: float, probes: int, min_keys: int) -> None:
    name = "tsa::select_keys"
    check_operands(name, x, causal=False)
    check_selected_from(name, x.k)
    if not 0 <= coverage < 1:
        raise ValueError(f"{name}: coverage must be in [0, 1), got {coverage}")
    if probes < 1 or min_keys < 1:
        raise ValueError(f"{name}: probes and min_keys must be at least 1, got {probes} and {min_keys}")


def key_attention(x: Operands, kept: Keys, scale: float, need_lse: bool) -> None:
    check_operands("tsa::key_attention", x, causal=False)
    check_lists("tsa::key_attention", x.q, x.k, *kept, capacity=kept.indices.shape[-1])


def remember_keys(x: Operands, scale: float, queries: int, count: int) -> None:
    name = "tsa::remember_keys"
    check_operands(name, x, causal=False)
    check_selected_from(name, x.k)
    if x.q.shape[2] > x.k.shape[2]:
        raise ValueError(f"{name}: a block of {x.q.shape[2]} rows is the last of the keys, of which there are {x.k.shape[2]}")
    if queries < 1 or count < 0:
        raise ValueError(f"{name}: queries must be at least 1 and count at least 0, got {queries} and {count}")


def merge(part: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    for label, (out, lse) in (("the first part", part), ("the second part", other)):
        shape = part[0].shape[:3]
        if out.dim() != 4 or out.shape != part[0].shape or out.dtype not in DTYPES or out.device != part[0].device:
            raise ValueError(f"tsa::merge: out of {label} must be {tuple(part[0].shape)}, got {out.dtype} {tuple(out.shape)}")
        if lse.dtype != torch.float32 or lse.shape != shape or lse.device != out.device:
            raise ValueError(f"tsa::merge: lse of {label} must be float32 {tuple(shape)}, got {lse.dtype} {tuple(lse.shape)}")


def check_engine(name: str, engine: str, allowed: tuple[str, ...]) -> None:
    """Raise a ValueError naming operator `name`, unless `engine` is one of `allowed`."""
    if engine not in allowed:
        raise ValueError(f"{name}: unknown engine {engine!r}; expected one of {', '.join(allowed)}")


def check_reference_engine(name: str, engine: str) -> None:
    """Raise a RuntimeError naming operator `name` if `engine`, asked for tensors on CPU, needs a GPU."""
    if engine not in ("auto", "reference"):
        raise RuntimeError(f"{name}: engine {engine!r} needs CUDA tensors; on CPU use auto or reference")
