"""Checks of block-sparse prefill on a GPU before it is timed: the operators against their references in float64."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch

from tsa_compile.kernels.attend.pages.reference import key_block_attention_reference
from tsa_compile.kernels.common.row_blocks import row_block_count, word_count
from tsa_compile.kernels.score.page_mass.reference import key_block_means_reference
from tsa_compile.kernels.select.threshold_pages.reference import select_key_blocks_reference, unpack_bits

Tensor = torch.Tensor
Padding = tuple[Tensor | None, Tensor | None, Tensor | None]  # start, lengths and key_mask of the operators
TOLERANCE = {torch.float16: 1.5e-3, torch.bfloat16: 1e-2}


class Check(NamedTuple):
    dtype: torch.dtype
    dim: int
    q_len: int
    k_len: int
    heads: int = 8
    kv_heads: int = 2
    batch: int = 1
    padding: str | None = None
    far: bool = False  # keys whose scores pass those of the row's own block by far
    need_lse: bool = True


HALF, BRAIN = torch.float16, torch.bfloat16
CHECKS = {
    "bf16": Check(BRAIN, 128, 1500, 1500, need_lse=False),
    "bf16 far keys": Check(BRAIN, 128, 1000, 1000, need_lse=False, far=True),
    "bf16 chunk, MQA 7": Check(BRAIN, 128, 700, 1501, 7, 1, need_lse=False),
    "bf16 short": Check(BRAIN, 128, 5, 5, need_lse=False),
    "bf16 long": Check(BRAIN, 128, 300, 9000, need_lse=False),
    "fp16": Check(HALF, 128, 1500, 1500),
    "fp16 far keys": Check(HALF, 128, 1000, 1000, far=True),
    "bf16 d 256": Check(BRAIN, 256, 1500, 1500, need_lse=False),
    "bf16 d 256, far keys": Check(BRAIN, 256, 1000, 1000, far=True),
    "bf16 d 256, long": Check(BRAIN, 256, 3000, 5000, need_lse=False),
    "fp16 d 256, chunk": Check(HALF, 256, 700, 1501, 7, 1, need_lse=False),
    "fp16 d 256, padding": Check(HALF, 256, 1000, 1200, batch=3, padding="both"),
    "fp16 d 256, holes": Check(HALF, 256, 1000, 1200, batch=2, padding="holes"),
    "fp16 d 64, padding": Check(HALF, 64, 1000, 1200, batch=3, padding="both"),
    "fp16 d 64, holes": Check(HALF, 64, 1000, 1200, batch=2, padding="holes"),
}


def make(check: Check) -> tuple[Tensor, Tensor, Tensor, Padding]:
    """q, k, v of `check`, strided as models have them, and (start, lengths, key_mask)."""
    draw = lambda length, heads: torch.randn(check.batch, length, heads, check.dim, device="cuda").transpose(1, 2)  # noqa: E731
    q, k, v = draw(check.q_len, check.heads), draw(check.k_len, check.kv_heads), draw(check.k_len, check.kv_heads)
    if check.far:
        k[:, :, 200:300] *= 30
        q[:, :, ::7] *= 8
    start = lengths = key_mask = None
    if check.padding == "both":
        start = torch.tensor([0, 77, 500], dtype=torch.int32, device="cuda")
        lengths = torch.tensor([1200, 1000, 650], dtype=torch.int32, device="cuda")
    if check.padding == "holes":
        key_mask = torch.rand(check.batch, check.k_len, device="cuda") < 0.7
        start, lengths = torch.ops.tsa.padding_range(key_mask)
    return q.to(check.dtype), k.to(check.dtype), v.to(check.dtype), (start, lengths, key_mask)


def attention_error(check: Check, share: float) -> float:
    """Relative error over a random bitmap with `share` of its bits set; wrong log-sum-exps raise."""
    q, k, v, padding = make(check)
    shape = (check.batch, check.heads, row_block_count(check.q_len, check.k_len), word_count(check.k_len), 64)
    bits = ((torch.rand(shape, device="cuda") < share).long() << torch.arange(64, device="cuda")).sum(-1)
    scale = check.dim**-0.5
    torch.full((1 << 24,), torch.nan, device="cuda")  # so that memory that no kernel writes is seen
    out, lse = torch.ops.tsa.key_block_attention(q, k, v, bits, None, 1, *padding, scale, check.need_lse)
    want, want_lse = key_block_attention_reference(q.double(), k.double(), v.double(), bits, None, 1, *padding, scale, True)
    if check.need_lse and not torch.allclose(lse, want_lse, rtol=0, atol=3e-3 if check.dtype == HALF else 2e-2):
        raise RuntimeError(f"{check}: log-sum-exps differ by {(lse - want_lse).nan_to_num().abs().max().item()}")
    if not (out[want_lse == -torch.inf] == 0).all():
        raise RuntimeError(f"{check}: a row without keys is not zero")
    return float((out.double() - want).norm() / want.norm())


def selection_error(check: Check, pool: int) -> float:
    """Share of the free key blocks on which the choice differs from the rule in float64."""
    q, k, _, padding = make(check)
    rule: tuple[Any, ...] = (check.dim**-0.5, [0.3], pool, 128, 4, 128)
    got = torch.ops.tsa.select_key_blocks(q, k, *torch.ops.tsa.key_block_means(k, *padding), *padding, *rule)
    means = key_block_means_reference(k.double(), *padding)
    want = select_key_blocks_reference(q.double(), *means, *padding, check.k_len, *rule)
    different = unpack_bits(got ^ want, -(-check.k_len // 64)).double().sum()
    return float(different / unpack_bits(want, -(-check.k_len // 64)).double().sum())


def check_all() -> dict[str, float]:
    """Errors by name.

    Raises:
        RuntimeError: one is above its tolerance.
    """
    torch.manual_seed(0)
    found: dict[str, float] = {}
    for name, check in CHECKS.items():
        started = time.time()
        for share in (0.0, 0.3, 1.0):
            found[f"{name}, {share}"] = error = attention_error(check, share)
            if not error < TOLERANCE[check.dtype] * (2 if check.far else 1):
                raise RuntimeError(f"{name}, share {share}: relative error {error:.2e}; nothing is timed")
        print(f"{name}: {found[f'{name}, 0.3']:.1e}, {time.time() - started:.1f} s", flush=True)
    for pool in (128, 16):
        for name in ("bf16", "bf16 chunk, MQA 7", "fp16 d 64, holes"):
            found[f"selection, {name}, pool {pool}"] = error = selection_error(CHECKS[name], pool)
            if not error < 2e-2:
                raise RuntimeError(f"selection, {name}, pool {pool}: {100 * error:.1f} % of the blocks differ; nothing is timed")
            print(f"selection, {name}, pool {pool}: {100 * error:.2f} % of the blocks differ", flush=True)
    return found
