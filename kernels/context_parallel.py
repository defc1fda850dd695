"""Block-sparse prefill of a prompt whose rows are spread over a process group: only key blocks that a row reads travel.

Each rank has the rows of two chunks (`common/zigzag.py`). It chooses key blocks for them by the mean keys of all ranks, which are
gathered; then the ranks tell each other which blocks they lack, and these go to them, for each KV head its own. What is chosen
and attended is what one process with every row would choose and attend.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

from tsa_compile.kernels import kept
from tsa_compile.kernels.common.group import number_of_each, rank_and_size
from tsa_compile.kernels.common.results import empty_result
from tsa_compile.kernels.common.view import padding_range
from tsa_compile.kernels.common.zigzag import ZigZag, gathered
from tsa_compile.kernels.context_pages import travelled
from tsa_compile.kernels.context_select import Prompt, Rule, Stages, chosen
from tsa_compile.kernels.registry import tell

Tensor = torch.Tensor


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    scale: float,
    alpha: Sequence[float],
    pool: int,
    window: int,
    sinks: int,
    last_dense: int,
    share: str,
    lookahead: bool,
    group: str,
) -> Tensor:
    """`tsa::context_parallel_attention` on any device.

    The host waits twice for the device: for how many rows each rank has, and for how many key blocks go from rank to rank.
    """
    rule = Rule(scale, tuple(alpha), pool, window, sinks, last_dense, share, lookahead)
    prompt = _prompt(q, k, v, key_mask, rule, group)
    lists = chosen(prompt, q, k, rule)
    tell(lambda: _kept(prompt, q, lists))
    keys, values = travelled(prompt, k, v, lists)
    out = empty_result(q, v)
    for (rows, chunk), bits in zip(prompt.own, lists, strict=True):
        seen = keys[:, :, : chunk.stop], values[:, :, : chunk.stop], bits
        out[:, :, rows] = Stages.of(q).attend(q[:, :, rows], *seen, None, 1, *prompt.padding(chunk.stop), scale, False)[0]
    return out


def _prompt(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, rule: Rule, group: str) -> Prompt:
    """How the rows of all ranks lie.

    Raises:
        ValueError: a rank calls with other numbers, or has other rows than it should; on every rank.
    """
    name, (rank, ranks), past = "tsa::context_parallel_attention", rank_and_size(group), k.shape[2] - q.shape[2]
    facts = {"batch rows": q.shape[0], "heads": q.shape[1], "KV heads": k.shape[1], "head dim": q.shape[3], "past": past}
    facts |= {"value head dim": v.shape[3], "bytes of a number": q.element_size(), "having a key_mask": key_mask is not None}
    facts |= {"the rule (its hash)": zlib.crc32(repr(rule).encode())}
    rows = number_of_each(name, facts, q.shape[2], q.device, group)
    cut = ZigZag(past, past + sum(rows), ranks)
    wanted = [cut.rows(r) for r in range(ranks)]
    if rows != wanted:
        raise ValueError(f"{name}: the ranks of group {group!r} have {rows} rows; of {sum(rows)} in zig-zag order it is {wanted}")
    if key_mask is None:
        return Prompt(cut, rank, group)
    new = gathered(key_mask[:, None, past:, None].to(torch.uint8), cut, group)
    mask = torch.cat([key_mask[:, :past], new[:, 0, :, 0].bool()], 1)
    return Prompt(cut, rank, group, *padding_range(mask), mask)


def _kept(prompt: Prompt, q: Tensor, lists: Sequence[Tensor]) -> tuple[Tensor, int]:
    """What recorders are told: of this rank's rows."""
    found, of = torch.zeros(q.shape[0], dtype=torch.int64, device=q.device), 0
    for (rows, chunk), bits in zip(prompt.own, lists, strict=True):
        number, more = kept.key_blocks(bits, (q[:, :, rows], q), {"k_len": chunk.stop})
        found, of = found + number, of + more
    return found, of
