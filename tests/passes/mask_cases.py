"""Hand-made masks, one function each, and what has to become of them: proven (and then exact) or dense with a reason.

Each function takes `(q, k, v, pad)`: q `[B, H, Lq, D]`, k and v `[B, Hk, Lk, D]`, pad `[B, Lk]` bool, true where a key is real.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Case = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class MaskCase:
    """`reason` is None where the site must be replaced, else a part of the reason why it must stay dense."""

    name: str
    function: Case
    reason: str | None
    past: int  # keys before the first query

    @property
    def padded(self) -> bool:
        return "padding" in self.name


CASES: dict[str, MaskCase] = {}


def case(reason: str | None = None, past: int = 0) -> Callable[[Case], Case]:
    def register(function: Case) -> Case:
        name = function.__name__
        CASES[name] = MaskCase(name, function, reason, past)
        return function

    return register


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True, **kwargs)


def positions(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `[Lq, 1]` (aligned to the last keys) and columns `[1, Lk]`."""
    past = k.shape[2] - q.shape[2]
    return torch.arange(q.shape[2])[:, None] + past, torch.arange(k.shape[2])[None, :]


def additive(allowed: Tensor, low: float = float("-inf")) -> Tensor:
    return torch.zeros(allowed.shape).masked_fill(~allowed, low)


# ---- causal, in many hands -------------------------------------------------------------------------------------------


@case()
def flag(q, k, v, pad):
    return sdpa(q, k, v, None, is_causal=True)


@case()
def flag_with_repeat_kv(q, k, v, pad):
    groups = q.shape[1] // k.shape[1]
    k, v = (x[:, :, None].expand(-1, -1, groups, -1, -1).reshape(x.shape[0], -1, *x.shape[2:]) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@case()
def flag_with_repeat_interleave(q, k, v, pad):
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@case()
def tril_of_ones(q, k, v, pad):
    return sdpa(q, k, v, torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril())


@case()
def not_triu(q, k, v, pad):
    return sdpa(q, k, v, ~torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1))


@case()
def compare_aranges(q, k, v, pad):
    row, column = positions(q, k)
    return sdpa(q, k, v, column <= row)


@case()
def strictly_greater_negated(q, k, v, pad):
    row, column = positions(q, k)
    return sdpa(q, k, v, torch.logical_not(column > row)[None, None])


@case()
def additive_minus_infinity(q, k, v, pad):
    row, column = positions(q, k)
    return sdpa(q, k, v, additive(column <= row))


@case()
def additive_finfo_min(q, k, v, pad):
    row, column = positions(q, k)
    return sdpa(q, k, v, additive(column <= row, torch.finfo(torch.float32).min))


@case()
def additive_full_triu(q, k, v, pad):
    return sdpa(q, k, v, torch.full((q.shape[2], k.shape[2]), float("-inf")).triu(1))


@case()
def additive_where(q, k, v, pad):
    row, column = positions(q, k)
    return sdpa(q, k, v, torch.where(column <= row, 0.0, float("-inf")))


@case()
def additive_product(q, k, v, pad):
    row, column = positions(q, k)
    return sdpa(q, k, v, (column > row).float() * torch.finfo(torch.float32).min)


@case()
def manual_masked_fill(q, k, v, pad):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    row, column = positions(q, k)
    scores = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).masked_fill(column > row, float("-inf"))
    return scores.softmax(-1) @ v


@case()
def manual_added(q, k, v, pad):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    row, column = positions(q, k)
    scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5 + additive(column <= row)
    return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


@case(past=5)
def cached_arange(q, k, v, pad):
    row, column = positions(q, k)
    return sdpa(q, k, v, column <= row)


@case(past=5)
def cached_tril_diagonal(q, k, v, pad):
    past = k.shape[2] - q.shape[2]
    return sdpa(q, k, v, torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(past))


@case(past=5)
def cached_but_top_left(q, k, v, pad):
    """`is_causal` with more keys than queries: the later keys are never seen."""
    return sdpa(q, k, v, None, is_causal=True)


@case()
def causal_twice(q, k, v, pad):
    row, column = positions(q, k)
    return sdpa(q, k, v, (column <= row) & (column <= row + 3))


# ---- causal with padding ---------------------------------------------------------------------------------------------


@case()
def padding_and_causal(q, k, v, pad):
    row, column = positions(q, k)
    return sdpa(q, k, v, (column <= row)[None, None] & pad[:, None, None, :])


@case()
def padding_and_causal_additive(q, k, v, pad):
    row, column = positions(q, k)
    return sdpa(q, k, v, additive((column <= row)[None, None] & pad[:, None, None, :], torch.finfo(torch.float32).min))


@case()
def padding_as_two_fills(q, k, v, pad):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    row, column = positions(q, k)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(column > row, float("-inf"))
    return scores.masked_fill(~pad[:, None, None, :], float("-inf")).softmax(-1) @ v


@case(past=4)
def padding_and_cache(q, k, v, pad):
    row, column = positions(q, k)
    return sdpa(q, k, v, (column <= row) & pad[:, None, None, :])


# ---- must not match --------------------------------------------------------------------------------------------------


@case("bidirectional")
def no_mask(q, k, v, pad):
    return sdpa(q, k, v, None)


@case("bidirectional")
def padding_only(q, k, v, pad):
    return sdpa(q, k, v, pad[:, None, None, :])


@case("bidirectional")
def padding_only_additive(q, k, v, pad):
    return sdpa(q, k, v, torch.where(pad[:, None, None, :], 0.0, torch.finfo(torch.float32).min))


@case("sliding window of 4")
def sliding(q, k, v, pad):
    row, column = positions(q, k)
    return sdpa(q, k, v, (column <= row) & (column > row - 4))


@case("sliding window of 4")
def sliding_with_cache_and_padding(q, k, v, pad):
    row, column = positions(q, k)
    return sdpa(q, k, v, ((column <= row) & (row - column < 4)) & pad[:, None, None, :])


@case("not a causal band")
def prefix_lm(q, k, v, pad):
    row, column = positions(q, k)
    return sdpa(q, k, v, (column <= row) | (column < 3))


@case("not a causal band")
def sinks_and_window(q, k, v, pad):
    row, column = positions(q, k)
    return sdpa(q, k, v, (column <= row) & ((column < 2) | (row - column < 4)))


@case("hides earlier keys but not later ones")
def transposed(q, k, v, pad):
    return sdpa(q, k, v, torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu())


@case("causal with offset -1")
def off_by_one_low(q, k, v, pad):
    row, column = positions(q, k)
    return sdpa(q, k, v, column < row)


@case("offset")
def off_by_one_high(q, k, v, pad):
    row, column = positions(q, k)
    return sdpa(q, k, v, column <= row + 1)


@case("not a causal band")
def causal_with_a_hole(q, k, v, pad):
    row, column = positions(q, k)
    return sdpa(q, k, v, (column <= row) & (column != 3))


@case("not a causal band")
def causal_with_a_window_hole(q, k, v, pad):
    row, column = positions(q, k)
    return sdpa(q, k, v, (column <= row) & ~((column > 2) & (column < 5)))


@case("varies with query and key in a way that is not understood")
def data_per_query(q, k, v, pad):
    row, column = positions(q, k)
    segment = pad.cumsum(-1)
    return sdpa(q, k, v, (column <= row) & (segment[:, None, :, None] == segment[:, None, None, :]))


@case("bias that is not a mask")
def random_bias(q, k, v, pad):
    return sdpa(q, k, v, q[:1, :1, :, :1] + k[:1, :1, :, 0])


@case("bias")
def alibi(q, k, v, pad):
    row, column = positions(q, k)
    slopes = 2.0 ** -torch.arange(1, q.shape[1] + 1)
    bias = -slopes[:, None, None] * (row - column)
    return sdpa(q, k, v, bias + additive(column <= row))


@case("bias")
def weak_fill(q, k, v, pad):
    """-5 is not "hidden"."""
    row, column = positions(q, k)
    return sdpa(q, k, v, additive(column <= row, -5.0))


@case("bias")
def fill_of_the_wrong_sign(q, k, v, pad):
    row, column = positions(q, k)
    return sdpa(q, k, v, additive(column <= row, 1e4))


@case()
def keys_dropped_by_the_layer(q, k, v, pad):
    """Not padding: the dropped tokens' own rows are results like any other."""
    row, column = positions(q, k)
    return sdpa(q, k, v, (column <= row) & (k[:, :1, :, 0] < 1.0)[:, :, None])


@case()
def keys_dropped_by_position(q, k, v, pad):
    row, column = positions(q, k)
    return sdpa(q, k, v, (column <= row) & (column % 2 == 0))


@case("scale is not a positive constant")
def negative_scale(q, k, v, pad):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    row, column = positions(q, k)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=additive(column <= row), scale=-0.25)


@case("differs between heads")
def data_per_head(q, k, v, pad):
    row, column = positions(q, k)
    seen = k[:, :1, :, 0].expand(-1, q.shape[1], -1) > -9
    heads = seen.reshape(q.shape[0], q.shape[1], 1, -1).contiguous()
    return sdpa(q, k, v, (column <= row) & (heads & (q[:, :, :1, :1] > -9)))


@case("varies with query and key in a way that is not understood")
def dilated(q, k, v, pad):
    row, column = positions(q, k)
    return sdpa(q, k, v, (column <= row) & ((row - column) % 2 == 0))


@case("varies with query and key in a way that is not understood")
def block_causal(q, k, v, pad):
    row, column = positions(q, k)
    return sdpa(q, k, v, column // 4 <= row // 4)


@case("softcap")
def softcapped(q, k, v, pad):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    row, column = positions(q, k)
    scores = torch.tanh(q @ k.mT * q.shape[-1] ** -0.5 / 30.0) * 30.0
    return (scores + additive(column <= row)).softmax(-1) @ v


@case("attention weights are used elsewhere")
def weights_returned(q, k, v, pad):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    row, column = positions(q, k)
    weights = (q @ k.mT * q.shape[-1] ** -0.5 + additive(column <= row)).softmax(-1)
    return weights @ v + weights.sum(-1, keepdim=True)
