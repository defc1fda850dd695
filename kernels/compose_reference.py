"""Operators of several operations in plain PyTorch, one batch row after the other without its padding.

The contract is docs/operators.md, `select_tokens`, `select_keys` and `token_block_attention`; this file is its
executable form and the product's CPU path.
It synchronises with the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tsa_compile.kernels.attend.pages.reference import key_block_attention_reference
from tsa_compile.kernels.attend.tokens.reference import RowStrip, by_row, merge_strip
from tsa_compile.kernels.checks import check_reference_engine
from tsa_compile.kernels.common.coverage_reference import finite_scores, largest
from tsa_compile.kernels.common.ranks import real_positions
from tsa_compile.kernels.score.last_queries.reference import token_scores_reference
from tsa_compile.kernels.score.page_mass.reference import key_block_means_reference
from tsa_compile.kernels.score.probes.reference import probe_scores_reference
from tsa_compile.kernels.select.threshold_pages.reference import select_key_blocks_reference
from tsa_compile.kernels.select.tokens.reference import everything_row, select_row
from tsa_compile.kernels.types import Attended, KeyBlockRule, Keys, Operands, Strip, TokenRule, Tokens

Tensor = torch.Tensor


def select_tokens_reference(x: Operands, scale: float, rule: TokenRule, share: str = "head") -> Tokens:
    """`tsa::select_tokens` for tensors on any device. Source: arXiv 2602.03216, section 3."""
    lists = (x.q if share == "head" else x.k).shape[1]

    def select(q_row: Tensor, k_row: Tensor) -> tuple[Tensor, Tensor]:
        length = k_row.shape[1]
        if length <= rule.min_tokens + rule.last_queries or rule.coverage == 0 or q_row.shape[1] == 0:
            return everything_row(lists, length, q_row.device)
        scores = token_scores_reference(q_row, k_row, scale, rule.last_queries, rule.pool)
        return select_row(scores, length, rule.coverage, rule.min_tokens, rule.heavy, lists)

    return _by_row(x, lists, rule.heavy, True, select)


def select_keys_reference(x: Operands, scale: float, coverage: float, probes: int, min_keys: int) -> Keys:
    """`tsa::select_keys` for tensors on any device."""

    def select(q_row: Tensor, k_row: Tensor) -> tuple[Tensor, Tensor]:
        heads, length = q_row.shape[0], k_row.shape[1]
        if length <= min_keys + 1 or coverage == 0 or q_row.shape[1] == 0:
            return everything_row(heads, length, q_row.device)
        scores = probe_scores_reference(q_row, k_row, scale, probes)[:, :-1]
        return select_row(scores, length, coverage, min_keys)

    return Keys(*_by_row(x, x.q.shape[1], 0, x.q.shape[2] == x.k.shape[2], select)[:2])


def remember_keys_reference(x: Operands, scale: float, queries: int, count: int) -> Keys:
    """`tsa::remember_keys` for tensors on any device. Source: MAGE, arXiv 2602.14209, "eq. 5" as two repositories have it."""
    (batch, _, rows, _), (kv_heads, k_len) = x.q.shape, x.k.shape[1:3]
    prefix = k_len - rows
    wanted = min(count, prefix)
    block = torch.arange(prefix, k_len, device=x.q.device).expand(kv_heads, -1)
    lists = []
    for q_row, k_row in zip(x.q, x.k, strict=True):
        if 0 < wanted < prefix and rows > 0:
            scores = probe_scores_reference(q_row, k_row, scale, queries)[:, :prefix]
            chosen = largest(finite_scores(scores).unflatten(0, (kv_heads, -1)).sum(1), wanted)
        else:
            chosen = torch.arange(wanted, device=x.q.device).expand(kv_heads, -1)
        lists.append(torch.cat([chosen, block], 1))
    indices = torch.stack(lists) if lists else block.new_empty(0, kv_heads, wanted + rows)
    return Keys(indices.int(), torch.full((batch,), wanted + rows, dtype=torch.int32, device=x.q.device))


def token_block_attention_reference(
    x: Operands, kept: Tokens, scale: float, strip: Strip, rule: KeyBlockRule, engine: str = "reference", need_lse: bool = False
) -> Attended:
    """`tsa::token_block_attention` for tensors on any device; it reads the counts, so it synchronises with the device."""
    check_reference_engine("tsa::token_block_attention", engine)

    def attend(b: int, q: Tensor, k: Tensor, v: Tensor, own: Tensor, strip: RowStrip) -> tuple[Tensor, Tensor]:
        out, lse = q.new_zeros(*q.shape[:2], v.shape[-1]), q.new_full(q.shape[:2], -torch.inf)
        if own.shape[1]:
            _attend_blocks(q, k, v, own, scale, rule, out, lse)
        if not strip.empty:
            merge_strip(q, k, v, own, strip, scale, out, lse)
        return out, lse

    return by_row(x, kept, strip, scale, False, need_lse, attend)


def _attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, own: Tensor, scale: float, rule: KeyBlockRule, out: Tensor, lse: Tensor
) -> None:
    """The kept tokens `[G, n]` as a sequence of n tokens, by key blocks, to their rows of out `[H, Lq, Dv]` and lse `[H, Lq]`."""
    heads, lists, count = q.shape[0], *own.shape
    of_list, of_head = torch.arange(lists, device=q.device)[:, None], torch.arange(heads, device=q.device)[:, None]
    keys, values = (x[of_list * k.shape[0] // lists, own][None] for x in (k, v))
    rows = (own - (k.shape[1] - q.shape[1])).repeat_interleave(heads // lists, 0)
    queries = torch.where((rows >= 0)[..., None], q[of_head, rows.clamp(min=0)], 0)[None]  # before the first query: zero
    means, numbers = key_block_means_reference(keys, None, None, None)
    chosen = (None, None, None, count, scale, [rule.alpha], *rule[1:])
    bits = select_key_blocks_reference(queries, means, numbers, *chosen)
    part, part_lse = key_block_attention_reference(queries, keys, values, bits, None, 1, None, None, None, scale, True)
    there = rows >= 0
    at = of_head.expand_as(rows)[there], rows[there]
    out[at], lse[at] = part[0][there], part_lse[0][there].to(lse.dtype)


def _by_row(
    x: Operands, lists: int, heavy: int, queries_are_keys: bool, select: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> Tokens:
    """`select(q [H, m, D], k [Hk, L, D])` for each batch row without its padding; positions are mapped back.

    queries_are_keys: the queries are the last of the keys' positions, so those that are padding are removed as well.
    """
    batch, q_len, k_len = x.q.shape[0], x.q.shape[2], x.k.shape[2]
    new = lambda *shape: torch.full(shape, -1, dtype=torch.int32, device=x.q.device)  # noqa: E731
    indices, counts, heavy_indices = new(batch, lists, k_len), new(batch), new(batch, lists, heavy)
    for b in range(batch):
        q_row, k_row, real = x.q[b], x.k[b], real_positions(x.view, b, k_len, x.q.device)
        if x.view.ranks is not None:
            k_row = k_row[:, real]
            if queries_are_keys:
                q_row = q_row[:, real[real >= k_len - q_len] - (k_len - q_len)]
        kept, heaviest = select(q_row, k_row)
        counts[b] = kept.shape[1]
        indices[b, :, : kept.shape[1]] = real[kept].int()
        heavy_indices[b, :, : heaviest.shape[1]] = real[heaviest].int()
    return Tokens(indices, counts, heavy_indices)
