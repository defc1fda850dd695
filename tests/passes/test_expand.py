"""`multi_head_attention_forward` written out, and masks filled in place; each with twins that must stay whole."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tests.passes.graphs import by_dynamo

B, H, L, D = 2, 4, 11, 16


class Multihead(torch.nn.Module):
    """`nn.MultiheadAttention` as its users call it; Dynamo keeps it as one call."""

    def __init__(self, **call):
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(64, 4, batch_first=True, dropout=0.5)
        self.call = call

    def forward(self, x, padding=None, mask=None):
        if mask is None:
            mask = torch.nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        if padding is not None:
            mask = mask != 0  # masks of different kinds are deprecated
        return self.attention(x, x, x, attn_mask=mask, key_padding_mask=padding, **self.call)[0]


PADDING = torch.tensor([[False] * L, [False] * (L - 3) + [True] * 3])


@pytest.mark.parametrize("call", [{"need_weights": False, "is_causal": True}, {"need_weights": False}, {}])
@pytest.mark.parametrize("padding", [None, PADDING])
def test_multihead_attention_is_written_out(call, padding):
    module, x = Multihead(**call).eval(), torch.randn(2, L, 64)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        outcome = by_dynamo(module, x, padding)
        expected = module(x, padding)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert outcome.replaced == [True], outcome.reasons
    real = slice(None) if padding is None else ~padding
    torch.testing.assert_close(outcome.result[real], expected[real], atol=2e-5, rtol=2e-5)


def test_multihead_attention_with_another_mask_is_dense():
    x, mask = torch.randn(2, L, 64), torch.zeros(L, L)
    mask[:, 3] = 1.0
    outcome = by_dynamo(Multihead(need_weights=False).eval(), x, None, mask)
    assert outcome.replaced == [False]
    assert "bias that is not a mask" in outcome.reasons[0]


def test_multihead_attention_that_trains_is_left_whole():
    outcome = by_dynamo(Multihead(need_weights=False).train(), torch.randn(2, L, 64))
    assert outcome.replaced == []
    assert "multi_head_attention_forward" in outcome.warnings[0]


def test_multihead_attention_whose_weights_are_used_is_left_whole():
    class Weights(Multihead):
        def forward(self, x):
            return self.attention(x, x, x)

    torch.backends.mha.set_fastpath_enabled(False)
    try:
        outcome = by_dynamo(Weights().eval(), torch.randn(2, L, 64))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert outcome.replaced == []
    assert "multi_head_attention_forward" in outcome.warnings[0]


@pytest.mark.parametrize("read_elsewhere", [False, True])
def test_a_fresh_mask_filled_in_place(read_elsewhere):
    def function(q, k, v):
        mask = torch.zeros(L, L)
        same = mask.view(L, L) if read_elsewhere else None
        filled = mask.masked_fill_(~torch.ones(L, L, dtype=torch.bool).tril(), -math.inf)
        if same is not None:
            same[0, 1] = 0.0  # shows a later token to the first query
        return F.scaled_dot_product_attention(q, k, v, attn_mask=filled)

    args = [torch.randn(B, H, L, D) for _ in range(3)]
    outcome = by_dynamo(function, *args)
    assert outcome.replaced == [not read_elsewhere], outcome.reasons
    torch.testing.assert_close(outcome.result, function(*args), atol=2e-5, rtol=2e-5)
