"""What the heads of `HeadSplit` read, for all rows of a text at once: in prompts, and in decode steps."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tsa_compile.cache.head_index import HeadIndex
from tsa_compile.kernels.common.pages import PAGE
from tsa_compile.kernels.common.rotation import before_rotation
from tsa_compile.kernels.common.row_blocks import KEYS, ROWS, WORD
from tsa_compile.kernels.select.role_blocks.reference import role_key_blocks
from tsa_compile.learn.page_rows import causal, keys_of, last_pages, open_pages, pages_by_means, whole_pages
from tsa_compile.learn.top_p import top_p
from tsa_compile.policies.head_split import HeadSplit, touched

Tensor = torch.Tensor


def prompt_keys_of_local_heads(policy: HeadSplit, there: Tensor) -> Tensor:
    """bool `[B, 1, L, L]`: what each row of a prompt reads in a head that looks nothing up; there: bool `[B, L]`."""
    length, (start, lengths) = there.shape[1], (there.int().argmax(1), there.sum(1))
    row = there[:, None, :, None]  # stands for q and k of one head: only sizes and device are read
    bits = role_key_blocks(row, row, start, lengths, [True], policy.window, policy.sinks, length)
    blocks = (bits[..., None] >> torch.arange(WORD, device=there.device) & 1).bool().flatten(-2)
    read = blocks.repeat_interleave(KEYS, -1)[..., :length].repeat_interleave(ROWS, 2)[:, :, :length]
    return causal(there, 0, length) & (read | torch.eye(length, dtype=torch.bool, device=there.device))


@torch.no_grad()
def step_keys(
    policy: HeadSplit, index: HeadIndex | None, q: Tensor, k: Tensor, there: Tensor, first: int, scale: float
) -> Tensor:
    """bool `[B, H, L - first, L]`: what the decode steps of the rows from `first` on read in each query head.

    Args:
        index: of the attention, for a policy with `mass`.
        q, k: rotated, `[B, H, L, D]` and `[B, Hk, L, D]`. there: bool `[B, L]`.

    Raises:
        ValueError: the policy needs an index, and there is none.
    """
    length, heads, group = q.shape[2], q.shape[1], q.shape[1] // k.shape[1]
    seen = causal(there, first, length)
    row = torch.arange(first, length, device=q.device)[:, None]
    key = torch.arange(length, device=q.device)
    sink = (key < there.int().argmax(1)[:, None] + policy.sinks)[:, None, None]
    local = seen & ((key > row - policy.window) | sink)
    owners = sorted({h // group for h in policy.retrieval})
    if policy.retrieval and policy.keep < 1:
        keep = [float(policy.keep) if g in owners else 0.0 for g in range(k.shape[1])]
        pages = pages_by_means(q, k, there, first, scale, keep, [0], touched(policy.sinks), touched(policy.window))
        wide = {g: seen & keys_of(pages[:, g, None], length) for g in owners}
    elif policy.retrieval and policy.mass is not None:
        lists = _lists(policy.mass, index, q, k, there, first)
        wide = {g: seen & keys_of(_joined(policy, lists, g, group, there, first), length) for g in owners}
    else:
        wide = dict.fromkeys(owners, seen)
    return torch.cat([wide[h // group] if h in policy.retrieval else local for h in range(heads)], 1)


def _joined(policy: HeadSplit, lists: dict[int, Tensor], owner: int, group: int, there: Tensor, first: int) -> Tensor:
    """bool `[B, 1, n, P]`: the pages that a KV head reads, by `tsa::join_pages`."""
    own = range(owner * group, (owner + 1) * group)
    pages = torch.stack([lists[h] for h in own if h in lists]).any(0)
    if all(h in lists for h in own):
        return pages[:, None]
    begin = there.int().argmax(1)[:, None, None] // PAGE
    page = torch.arange(pages.shape[-1], device=there.device)
    near = last_pages(there, first, touched(policy.window)) | (page < begin + touched(policy.sinks))
    return (pages | near)[:, None]


def _lists(mass: float, index: HeadIndex | None, q: Tensor, k: Tensor, there: Tensor, first: int) -> dict[int, Tensor]:
    """The pages `[B, n, P]` of each head that looks things up: `tsa::projected_scores`, and `tsa::select_pages` by mass."""
    if index is None:
        raise ValueError("HeadSplit.mass needs an index in the attention (Plan.weights)")
    real, opened = whole_pages(there, first)[:, 0], open_pages(there, first)
    last = real & last_pages(there, first, 1)
    positions = torch.arange(k.shape[2], device=k.device) - there.int().argmax(1)[:, None]  # [B, L]
    rotation = (index.frequencies.to(k.device), index.interleaved, index.factor)
    lists = {}
    for n, (h, g) in enumerate(zip(index.heads, index.owners, strict=True)):
        query = before_rotation(q[:, h, first:], positions[:, first:], *rotation) @ index.query[n].float().mT
        key = before_rotation(k[:, g], positions, *rotation) @ index.key[n].float().mT
        z = (query @ key.mT).masked_fill(~there[:, None], -torch.inf)
        z = F.pad(z, (0, -z.shape[-1] % PAGE), value=-torch.inf).unflatten(-1, (-1, PAGE)).logsumexp(-1)
        shares = z.masked_fill(~real, -torch.inf).softmax(-1).nan_to_num(0.0)
        free = shares.masked_fill(last, 0.0)  # the last page is read anyway, and its mass counts
        missing = mass - (shares - free).sum(-1, keepdim=True)
        least = (missing / free.sum(-1, keepdim=True).clamp_min(1e-30)).clamp(0.0, 1.0)
        lists[h] = (top_p(free, least) & real) | last | opened
    return lists
