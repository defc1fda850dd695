"""Inputs of the tests of block-sparse prefill, and which keys a row of them reads."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tsa_compile.kernels.common.row_blocks import KEYS, ROWS, own_keys, valid_keys, valid_range
from tsa_compile.kernels.common.view import padding_range
from tsa_compile.kernels.select.threshold_pages.reference import unpack_bits

Tensor = torch.Tensor


class Case(NamedTuple):
    q: Tensor  # [B, H, Lq, D]
    k: Tensor
    v: Tensor
    start: Tensor | None  # int32 [B]
    lengths: Tensor | None
    key_mask: Tensor | None  # bool [B, Lk]
    scale: float

    @property
    def padding(self) -> tuple[Tensor | None, ...]:
        return self.start, self.lengths, self.key_mask


PADDING = ("start", "lengths", "key_mask")
SHAPES = {
    "plain": dict(q_len=640, k_len=640, heads=2),
    "ragged": dict(q_len=397, k_len=397, heads=3, kv_heads=1),
    "short": dict(q_len=50, k_len=50),
    "one row": dict(q_len=1, k_len=300),
    "chunk": dict(q_len=200, k_len=777, heads=6, kv_heads=2),
    "left padding": dict(q_len=390, k_len=390, batch=3, heads=2, kv_heads=1, padding="left"),
    "right padding": dict(q_len=390, k_len=390, batch=3, heads=2, padding="right"),
    "both, a chunk": dict(q_len=150, k_len=450, batch=2, padding="both", heads=7, kv_heads=1),
    "holes": dict(q_len=300, k_len=400, batch=2, heads=2, padding="holes"),
    "head dims": dict(q_len=390, k_len=390, dim=24, v_dim=40),
}


def make_case(
    q_len: int,
    k_len: int,
    batch: int = 1,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    v_dim: int | None = None,
    padding: str | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Case:
    """Keys that come in stretches of some 50, so that masses of key blocks differ."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    k = (
        draw(batch, kv_heads, k_len, dim)
        + 1.5 * draw(batch, kv_heads, -(-k_len // 50), dim).repeat_interleave(50, 2)[:, :, :k_len]
    )
    q = draw(batch, heads, q_len, dim) + draw(batch, heads, -(-q_len // 30), dim).repeat_interleave(30, 2)[:, :, :q_len]
    v = draw(batch, kv_heads, k_len, v_dim or dim)
    start = lengths = key_mask = None
    if padding in ("left", "both"):
        start = (torch.arange(batch) * (k_len // 3) // max(batch - 1, 1) + torch.arange(batch) % 2).int()
    if padding in ("right", "both"):
        lengths = (k_len - torch.arange(batch) * (k_len // 2) // max(batch - 1, 1)).int()
        lengths = lengths if start is None else torch.minimum(lengths, k_len - start)
        lengths[-1] -= 17
    if padding == "holes":
        key_mask = torch.rand(batch, k_len, generator=g) < 0.7
        key_mask[:, 64:128] = False  # a whole key block
        key_mask[0, :20], key_mask[-1, -30:] = False, False
        start, lengths = padding_range(key_mask)
    return Case(*(x.to(dtype) for x in (q, k, v)), start, lengths, key_mask, dim**-0.5)


def moved(case: Case, dtype: torch.dtype, device: str) -> Case:
    return Case(*(x.to(device, dtype) for x in case[:3]), *(x if x is None else x.to(device) for x in case[3:6]), case.scale)


def visible_keys(case: Case, bits: Tensor) -> Tensor:
    """Which keys each row reads: bool `[B, H, Lq, Lk]`."""
    (batch, heads, q_len, _), k_len = case.q.shape, case.k.shape[2]
    kept = unpack_bits(bits.cpu(), -(-k_len // KEYS)).repeat_interleave(heads // bits.shape[1], 1)
    case = case._replace(**{x: y if y is None else y.cpu() for x, y in case._asdict().items() if x in PADDING})
    first, end = valid_range(batch, k_len, case.start, case.lengths, torch.device("cpu"))
    own = own_keys(q_len, k_len, end)[1]
    key, at = torch.arange(k_len), torch.arange(k_len - q_len, k_len)
    block = at // ROWS - (k_len - q_len) // ROWS
    seen = (key <= at[:, None]) & valid_keys(k_len, first, end, case.key_mask)[:, None]
    mine = (key >= own[:, block, None]) & (key < own[:, block, None] + ROWS)
    return seen[:, None] & (kept[:, :, block][..., key // KEYS] | mine[:, None])


def dense_attention(case: Case, seen: Tensor) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp) in float64 of the keys `seen`, a mask `[B, H or 1, Lq, Lk]`; a row without keys is zero, and -inf."""
    heads, kv_heads = case.q.shape[1], case.k.shape[1]
    q, k, v = (x.cpu().double() for x in case[:3])
    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    scores = (case.scale * q @ k.transpose(2, 3)).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1).nan_to_num(0) @ v, scores.logsumexp(-1)
