"""Block-sparse attention among the kept tokens, in plain PyTorch: which blocks, and the attention.

Scores of pooled queries and keys and a threshold on their cumulative mass, after FlexPrefill (arXiv 2502.20766), without its
sort and its second pattern. The contract is docs/operators.md, `select_blocks` and `block_sparse_attention`.
"""

from __future__ import annotations

import torch

from tsa_compile.kernels.attend.tokens.reference import RowStrip, by_row, merge_strip
from tsa_compile.kernels.checks import check_reference_engine
from tsa_compile.kernels.types import Attended, BlockLists, BlockRule, Keys, Operands, Strip, Tokens

Tensor = torch.Tensor


def select_blocks_reference(x: Operands, kept: Keys, scale: float, rule: BlockRule) -> BlockLists:
    """`tsa::select_blocks` for tensors on any device; it reads the counts, so it synchronises with the device.

    Meaning: docs/operators.md. Source: arXiv 2502.20766, section 3.
    """
    q, k, (indices, counts), (block, pool, mass, sinks, local, dense_below) = x.q, x.k, kept, rule
    (batch, heads), n_blocks = q.shape[:2], -(-k.shape[2] // block)
    blocks = torch.full((batch, heads, n_blocks, n_blocks), -1, dtype=torch.int16, device=q.device)
    block_counts = torch.zeros(batch, heads, n_blocks, dtype=torch.int32, device=q.device)
    for b, n in enumerate(counts.tolist()):
        rows = -(-n // block)
        if rows == 0:
            continue
        masses = block_masses(q[b], k[b], indices[b, :, :n].long(), scale, block, pool)
        row, column = (torch.arange(rows, device=q.device) for _ in range(2))
        wanted = kept_by_mass(masses, mass) | (column < sinks) | (column > row[:, None] - local) | (n <= dense_below or mass >= 1)
        last = indices[b][:, torch.arange(block - 1, rows * block, block, device=q.device).clamp(max=n - 1)]  # [G, N] positions
        has_query = (last >= k.shape[2] - q.shape[2]).repeat_interleave(heads // indices.shape[1], 0)
        wanted &= (column <= row[:, None]) & has_query[..., None]
        listed = torch.where(wanted, column, n_blocks).sort(-1).values
        blocks[b, :, :rows, :rows] = torch.where(listed < n_blocks, listed, -1).short()
        block_counts[b, :, :rows] = wanted.sum(-1).int()
    return BlockLists(blocks, block_counts)


def block_masses(q: Tensor, k: Tensor, kept: Tensor, scale: float, block: int, pool: int) -> Tensor:
    """Estimated attention mass `[H, N, N]` of each block of queries to each block of keys, for one batch row.

    Args:
        q, k: `[H, Lq, D]` and `[Hk, Lk, D]`.
        kept: `[G, n]` positions, ascending; `N = ceil(n / block)`.
    """
    (heads, q_len, _), (kv_heads, k_len, _), lists = q.shape, k.shape, kept.shape[0]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = (kept - (k_len - q_len)).repeat_interleave(heads // lists, 0)
    kv_head = torch.arange(lists, device=q.device)[:, None] * kv_heads // lists
    q_kept = q[torch.arange(heads, device=q.device)[:, None], rows.clamp(min=0)].to(dtype)
    queries, has_query = _pooled(q_kept, rows >= 0, block, pool)
    keys, has_key = _pooled(k[kv_head, kept].to(dtype), torch.ones_like(kept, dtype=torch.bool), block, pool)
    keys, has_key = keys.repeat_interleave(heads // lists, 0), has_key.repeat_interleave(heads // lists, 0)
    scores = queries @ keys.mT * scale
    later = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
    shares = scores.masked_fill(later | ~has_key[:, None], -torch.inf).softmax(-1)
    shares = torch.where(has_query[..., None], shares, 0.0)
    per_block = block // pool
    masses = shares.unflatten(2, (-1, per_block)).sum(3).unflatten(1, (-1, per_block)).sum(2)
    return torch.where((masses >= 0) & (masses <= 2 * per_block), masses, 0.0)  # not finite: counts for nothing


def _pooled(x: Tensor, present: Tensor, block: int, pool: int) -> tuple[Tensor, Tensor]:
    """Means of every `pool` rows of `[H, n, D]`, of those present `[H, n]`; and which have one. Blocks are filled up."""
    fill = -x.shape[1] % block
    x = torch.nn.functional.pad(x * present[..., None], (0, 0, 0, fill)).unflatten(1, (-1, pool)).sum(2)
    number = torch.nn.functional.pad(present, (0, fill)).unflatten(1, (-1, pool)).sum(2)
    return x / number.clamp(min=1)[..., None], number > 0


def kept_by_mass(masses: Tensor, mass: float) -> Tensor:
    """Bool like masses `[..., N]`: the blocks of which the heavier ones together hold less than a share `mass`."""
    values, order = masses.sort(-1, descending=True)
    heavier = values.cumsum(-1) - values
    first_of_equals = torch.searchsorted(-values.contiguous(), -values.contiguous())  # equal blocks share a fate
    heavier = heavier.gather(-1, first_of_equals)
    kept = heavier < mass * masses.sum(-1, keepdim=True)
    return torch.zeros_like(kept).scatter_(-1, order, kept)


def block_sparse_attention_reference(
    x: Operands, kept: Tokens, lists: BlockLists, scale: float, strip: Strip, block: int, engine: str = "reference",
    need_lse: bool = False,
) -> Attended:  # fmt: skip
    """`tsa::block_sparse_attention` for tensors on any device; it reads the counts, so it synchronises with the device.

    Meaning: docs/operators.md.
    """
    check_reference_engine("tsa::block_sparse_attention", engine)

    def attend(b: int, q: Tensor, k: Tensor, v: Tensor, own: Tensor, strip: RowStrip) -> tuple[Tensor, Tensor]:
        out = q.new_zeros(*q.shape[:2], v.shape[-1])
        lse = q.new_full(q.shape[:2], -torch.inf)
        member = _members(lists.blocks[b].long(), lists.counts[b])
        for row in range(-(-own.shape[1] // block)):
            _attend_block(q, k, v, own, member[:, row], row, scale, block, out, lse)
        if not strip.empty:
            merge_strip(q, k, v, own, strip, scale, out, lse)
        return out, lse

    return by_row(x, kept, strip, scale, False, need_lse, attend)


def _members(blocks: Tensor, block_counts: Tensor) -> Tensor:
    """[H, N, N] block lists -> bool [H, N, N], [query block, key block]."""
    listed = torch.arange(blocks.shape[-1], device=blocks.device) < block_counts[..., None]
    member = torch.zeros(*blocks.shape[:-1], blocks.shape[-1] + 1, dtype=torch.bool, device=blocks.device)
    return member.scatter_(-1, torch.where(listed, blocks, blocks.shape[-1]), True)[..., :-1]


def _attend_block(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, member: Tensor, row: int, scale: float, block: int, out: Tensor, lse: Tensor
) -> None:
    """The queries of one block, to their rows of out [H, Lq, Dv] and lse [H, Lq]. member: bool [H, N], its key blocks."""
    (heads, q_len, _), (kv_heads, k_len, _), lists = q.shape, k.shape, kept.shape[0]
    first, end = row * block, min((row + 1) * block, kept.shape[1])
    rows = (kept[:, first:end] - (k_len - q_len)).repeat_interleave(heads // lists, 0)
    if int(rows.max()) < 0:
        return
    head = torch.arange(heads, device=q.device)[:, None]
    kv_head = torch.arange(lists, device=q.device)[:, None] * kv_heads // lists
    keys, values = (x[kv_head, kept[:, :end]].repeat_interleave(heads // lists, 0) for x in (k, v))
    slots = torch.arange(end, device=q.device)
    allowed = member[:, slots // block][:, None] & (slots <= slots[first:, None])
    scores = (q[head, rows.clamp(min=0)] @ keys.mT * scale).masked_fill(~allowed, -torch.inf)
    part_lse = scores.logsumexp(-1)
    part = scores.softmax(-1).nan_to_num(0.0) @ values
    at = head.expand_as(rows)[rows >= 0], rows[rows >= 0]
    out[at], lse[at] = part[rows >= 0], part_lse[rows >= 0]
