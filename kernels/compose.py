"""Operators of several operations: a selection is scores, then the choice; key blocks among kept tokens are both."""

from __future__ import annotations

import functools

import torch

from tsa_compile.kernels.attend.pages.host import key_block_attention
from tsa_compile.kernels.attend.tokens.engines import InnerEngine
from tsa_compile.kernels.attend.tokens.packed import packed_attention
from tsa_compile.kernels.common.launch import check_triton
from tsa_compile.kernels.common.padding import attend_padding
from tsa_compile.kernels.compose_reference import token_block_attention_reference
from tsa_compile.kernels.score.last_queries.host import last_query_scores
from tsa_compile.kernels.score.page_mass.host import key_block_means
from tsa_compile.kernels.score.probes.host import probe_means, probing_queries
from tsa_compile.kernels.select.threshold_pages.host import select_key_blocks
from tsa_compile.kernels.select.tokens.host import select_everything, select_from_means, zeros
from tsa_compile.kernels.types import Attended, KeyBlockRule, Keys, Operands, Strip, TokenRule, Tokens

Tensor = torch.Tensor
ALL_BUT_NOTHING = 1 - 2.0**-53  # the largest share below 1


def token_sparse_attention(x: Operands, scale: float, rule: TokenRule, strip: Strip, engine: str) -> Tensor:
    """`tsa::token_sparse_attention` on every device: `key_view`, `select_tokens`, `sparse_attention`; zero in rows of padding."""
    order = (None, None) if x.key_mask is None else torch.ops.tsa.key_view(x.key_mask)
    kept = torch.ops.tsa.select_tokens(x.q, x.k, *order, scale, *rule)
    dense_below = rule.min_tokens + rule.last_queries
    out = torch.ops.tsa.sparse_attention(x.q, x.k, x.v, *kept, *order, scale, *strip, dense_below, engine)[0]
    if x.key_mask is None:
        return out
    real = x.key_mask[:, x.k.shape[2] - x.q.shape[2] :, None].unsqueeze(1)
    return out.masked_fill_(~real, 0.0)


def select_tokens(x: Operands, scale: float, rule: TokenRule, share: str = "head") -> Tokens:
    """`tsa::select_tokens` by Triton: (indices `[B, G, Lk]`, counts `[B]`, heavy_indices `[B, G, heavy]`), all int32.

    Nothing waits for the device, and lengths are run-time arguments: a new length compiles nothing.
    Source: arXiv 2602.03216, section 3.

    Raises:
        ValueError: float64, which Triton's dot does not take.
    """
    q, k = x.q, x.k
    if q.dtype == torch.float64:
        raise ValueError("tsa::select_tokens: float64 runs on CPU only")
    lists = (q if share == "head" else k).shape[1]
    if k.shape[2] <= rule.min_tokens + rule.last_queries or rule.coverage == 0 or q.shape[2] == 0 or q.shape[0] == 0:
        return select_everything(k, x.view, rule.heavy, lists)
    zeroed = zeros(q.shape[0], lists, q.shape[1], q.device)
    padded = x.view.ranks is not None
    order, ranks = x.view.order if padded else (zeroed.through, zeroed.through)  # not read
    mean = last_query_scores(q, k, order, ranks, padded, scale, rule.last_queries, zeroed.through)
    return select_from_means(mean, q.shape[2], x.view, rule, lists, zeroed)


def select_keys(x: Operands, scale: float, coverage: float, probes: int, min_keys: int) -> Keys:
    """`tsa::select_keys` by Triton: (indices `[B, H, Lk]`, counts `[B]`), int32. The contract is docs/operators.md.

    Nothing waits for the device, and lengths are run-time arguments.

    Raises:
        ValueError: float64, which Triton's dot does not take.
    """
    q, k, view = x.q, x.k, x.view
    if q.dtype == torch.float64:
        raise ValueError("tsa::select_keys: float64 runs on CPU only")
    q_len, k_len = q.shape[2], k.shape[2]
    if k_len <= min_keys + 1 or coverage == 0 or q_len == 0 or q.shape[0] == 0:
        return Keys(*select_everything(k, view, 0, q.shape[1])[:2])
    mean = probe_means(probing_queries(q, k_len, view, probes), k, view, scale)
    rule = TokenRule(coverage, last_queries=1, pool=1, min_tokens=min_keys)
    return Keys(*select_from_means(mean, k_len, view, rule, q.shape[1])[:2])


def remember_keys(x: Operands, scale: float, queries: int, count: int) -> Keys:
    """`tsa::remember_keys` by Triton: (indices `[B, Hk, min(count, Lk - Lq) + Lq]`, counts `[B]`), int32.

    Nothing waits for the device, and lengths are run-time arguments.

    Raises:
        ValueError: float64, which Triton's dot does not take.
    """
    q, k = x.q, x.k
    if q.dtype == torch.float64:
        raise ValueError("tsa::remember_keys: float64 runs on CPU only")
    (batch, _, rows, _), (kv_heads, k_len) = q.shape, k.shape[1:3]
    prefix = k_len - rows
    wanted = min(count, prefix)
    block = torch.arange(prefix, k_len, dtype=torch.int32, device=q.device).expand(batch, kv_heads, -1)
    if 0 < wanted < prefix and rows > 0 and batch > 0:
        mean = probe_means(probing_queries(q, k_len, x.view, queries), k, x.view, scale)
        # The tokens before the last one, here the block's first, by score: as many as `min_tokens`, as nothing else is covered.
        rule = TokenRule(ALL_BUT_NOTHING, last_queries=1, pool=1, min_tokens=wanted)
        chosen = select_from_means(mean[..., : prefix + 1].contiguous(), prefix + 1, x.view, rule, kv_heads).indices[..., :wanted]
    else:
        chosen = torch.arange(wanted, dtype=torch.int32, device=q.device).expand(batch, kv_heads, -1)
    counts = torch.full((batch,), wanted + rows, dtype=torch.int32, device=q.device)
    return Keys(torch.cat([chosen, block], 2), counts)


def token_block_attention(
    x: Operands, kept: Tokens, scale: float, strip: Strip, rule: KeyBlockRule, engine: str = "auto", need_lse: bool = False
) -> Attended:
    """`tsa::token_block_attention` on a GPU: the kept tokens of a head are packed, and attended by key blocks. docs/operators.md.

    Nothing waits for the device, except engine "reference". Scratch: packed rows of some heads, up to 1 GB.

    Raises:
        ValueError: a dtype, head dim or scale that Triton does not take.
    """
    if engine == "reference":
        return token_block_attention_reference(x, kept, scale, strip, rule, engine, need_lse)
    check_triton(x.q, x.v, scale, engine)
    blocks = InnerEngine("key blocks", lambda q, v: None, functools.partial(_attend_blocks, rule=rule), chunks=True)
    result = packed_attention(x, kept, scale, strip, need_lse, blocks)
    attend_padding(x, result, scale)
    return result


def _attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, scale: float, need_lse: bool, rule: KeyBlockRule
) -> tuple[Tensor, Tensor | None]:
    """`engines.Attend` by key blocks: packed rows are a sequence of `counts` tokens."""
    means, numbers = key_block_means(k, None, counts, None)
    bits = select_key_blocks(q, means, numbers, None, counts, None, k.shape[2], scale, [rule.alpha], *rule[1:])
    out, lse = key_block_attention(q, k, v, bits, None, 1, None, counts, None, scale, need_lse)
    return out, lse if need_lse else None
