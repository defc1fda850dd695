"""`tsa::key_block_attention` and `block_sparse_attention` in core operators (docs/operators.md).

Each query head and row block has a list of key blocks, of a length of its own. Padded to one length they would all be as long
as those of the last rows, which read everything: dense attention. So lists are sorted into a few widths, each list into the
least that holds it, and each width is one attention of as many lists as there are, a size that depends on data. So no more
scores are stored than twice those of the kept key blocks, or of 16 for each list.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from tsa_compile.export.torch_tensorrt_lowering.attend import no_lse_wanted, stored
from tsa_compile.export.torch_tensorrt_lowering.blocks import Keys, RowBlocks, refuse_pool
from tsa_compile.export.torch_tensorrt_lowering.kept import for_heads, kept_size
from tsa_compile.export.torch_tensorrt_lowering.rows import HIDDEN, Size, compact, number, running_sum
from tsa_compile.export.torch_tensorrt_lowering.select_blocks import key_block_means, select_key_blocks
from tsa_compile.kernels.common.results import no_lse
from tsa_compile.kernels.common.row_blocks import KEYS, ROWS

Tensor = torch.Tensor
WIDTHS = (16, 32, 64, 128, 256, 512, 1024, 2048)  # key blocks of a list; longer ones are as wide as the keys


class _Lists(NamedTuple):
    """One list for each batch row, query head and row block, `n` in all.

    blocks: int64 `[n, C + 1]`, the key blocks, ascending, then -1. length: int64 `[n]`, 0: nobody reads its rows.
    place: int64 `[n, 4]`: position of its first row; rows of q, of k and positions before those of its head and batch row.
    """

    blocks: Tensor
    length: Tensor
    place: Tensor


class _Part(NamedTuple):
    """The lists of one width.

    member: bool `[n]`. size: how many, at least 1. out: `[size, 128, Dv]`, in the order of the lists.
    """

    member: Tensor
    size: Size
    out: Tensor


def key_block_attention(
    q: Tensor, k: Tensor, v: Tensor, bits: Tensor, blocks: Tensor | None, block: int, start: Tensor | None,
    lengths: Tensor | None, key_mask: Tensor | None, scale: float, need_lse: bool, *, k_len: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out `[B, H, Lq, Dv]`, no log-sum-exp). bits: what the lowered `select_key_blocks` gives.

    Raises:
        ExportError: `need_lse`, or keys lie in a pool.
    """
    no_lse_wanted("key_block_attention", need_lse)
    refuse_pool("key_block_attention", blocks, k_len)
    keys = Keys(k, start, lengths, key_mask)
    cut = RowBlocks(q.shape[2], keys)
    lists = _lists(q, bits, keys, cut)
    parts, above = [], 0
    for width in (*(w for w in WIDTHS if w < _most(keys.blocks - 1)), None):
        member = lists.length > above
        if width is not None:
            member = member & (lists.length <= width)
        widest = keys.blocks if width is None else torch.sym_min(width, keys.blocks)
        parts.append(_attend(q, k, v, keys, cut, lists, member, widest, scale))
        above = width or above
    return stored(_in_order(q, parts, cut).to(q.dtype)), no_lse(q)


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None, block: int, start: Tensor | None, lengths: Tensor | None,
    key_mask: Tensor | None, scale: float, *rule: Any, k_len: int | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """Selection and attention in one, `[B, H, Lq, Dv]`. rule, options: as `select_key_blocks` takes them.

    Raises:
        ExportError: keys lie in a pool.
    """
    refuse_pool("block_sparse_attention", blocks, k_len)
    real = (start, lengths, key_mask)
    bits = select_key_blocks(q, k, *key_block_means(k, *real), *real, scale, *rule, **options)
    return key_block_attention(q, k, v, bits, None, 1, *real, scale, False)[0]


def _most(size: Size) -> float:
    """The largest number that a size can be."""
    return size if isinstance(size, int) else float(size.node.shape_env.bound_sympy(size.node.expr).upper)


def _lists(q: Tensor, bits: Tensor, keys: Keys, cut: RowBlocks) -> _Lists:
    batch, heads, q_len, _ = q.shape
    at = torch.arange(keys.blocks, device=q.device) * KEYS
    own = cut.own[..., None]
    read = for_heads(bits, heads) | ((at >= own) & (at < own + ROWS))[:, None]
    read = (read & cut.there[:, None]).flatten(1, 2)  # [B, H * (R + 1), C + 1]
    column = torch.arange(keys.blocks, device=q.device)
    blocks = compact(read, column[None, None], keys.blocks, read.shape[1])
    row = torch.arange(batch, device=q.device)[:, None, None]
    head = torch.arange(heads, device=q.device)[:, None]
    columns = (
        cut.begin,
        (row * heads + head) * q_len,
        (row * keys.kv_heads + head * keys.kv_heads // heads) * keys.length,
        row * keys.length,
    )
    whole = torch.zeros(batch, heads, cut.number, dtype=torch.int64, device=q.device)
    place = torch.stack([(x + whole).flatten() for x in columns], 1)
    return _Lists(blocks.flatten(0, 1), read.long().sum(2).flatten(), place)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, keys: Keys, cut: RowBlocks, lists: _Lists, member: Tensor, width: Size, scale: float
) -> _Part:
    """Attention of the member lists (bool `[n]`), none of which has more than `width` key blocks."""
    n = lists.blocks.shape[0]
    size = kept_size(member.long().sum(0, keepdim=True), n)
    own = compact(member[None, None], torch.arange(n, device=q.device)[None, None], n, 1)[0, 0]
    own = own.index_select(0, torch.arange(size, device=q.device)).clamp(min=0)
    begin, of_q, of_k, of_row = (x[:, :1] for x in F.embedding(own, lists.place).split(1, 1))
    row = begin + torch.arange(ROWS, device=q.device)  # [size, 128], a position
    queries = _rows(q, (row - cut.offset).clamp(min=0).minimum(torch.arange(q.shape[2], device=q.device)[-1:]) + of_q)
    blocks = F.embedding(own, lists.blocks).index_select(1, torch.arange(width, device=q.device))
    key = (blocks[..., None] * KEYS + torch.arange(KEYS, device=q.device)).flatten(1)  # [size, width * 64], below 0: none
    at = keys.clip(key)
    read = (key >= 0)[:, None] & (key[:, None] <= row[..., None])
    if keys.real is not None:
        read = read & (F.embedding(at + of_row, keys.real.reshape(-1, 1).long())[:, None, :, 0] > 0)
    scores = torch.where(read, (queries @ _rows(k, at + of_k).transpose(1, 2)).float() * scale, HIDDEN)
    out = scores.softmax(-1).to(v.dtype) @ _rows(v, at + of_k)
    if keys.real is not None:
        out = torch.where(scores.amax(2, keepdim=True) > HIDDEN / 2, out, 0.0)
    return _Part(member, size, out)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x `[B, H, n, E]`, numbered through: index `[size, m]` -> `[size, m, E]`."""
    return F.embedding(index, x.reshape(-1, x.shape[3]))


def _in_order(q: Tensor, parts: list[_Part], cut: RowBlocks) -> Tensor:
    """The results of all widths by query: `[B, H, Lq, Dv]`."""
    batch, heads, q_len, _ = q.shape
    at, behind = torch.zeros_like(parts[0].member.long()), torch.zeros_like(parts[0].member.long()[:1])
    for part in parts:
        at = torch.where(part.member, running_sum(part.member) - 1 + behind, at)
        behind = behind + number(part.size, q.device)[0]
    position = torch.arange(q_len, device=q.device) + cut.offset
    batch_row = torch.arange(batch, device=q.device)[:, None, None]
    head = torch.arange(heads, device=q.device)[:, None]
    listed = (batch_row * heads + head) * cut.number + position // ROWS - cut.before  # [B, H, Lq]
    row = F.embedding(listed, at[:, None])[..., 0] * ROWS + position % ROWS
    return F.embedding(row, torch.cat([part.out for part in parts], 0).flatten(0, 1))
