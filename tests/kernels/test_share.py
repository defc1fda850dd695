"""`share="group"`: one selection for the heads of a KV head (docs/operators.md, `select_tokens`, steps 6 and 7)."""

import dataclasses

import pytest
import torch

import tsa_compile as tsa
from tests.api.tiny import SPARSE, tiny_llama, token_ids
from tests.kernels.flat import order
from tsa_compile.session import attached

NUMBERS = (0.25, 0.3, 8, 3, 16, 4)  # scale, coverage, window, pool, min_tokens, heavy


def test_the_groups_heads_choose_by_the_sum_of_their_scores():
    """By hand: eight heads in two groups; heads of a group disagree, and the sum decides."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 8, 90, 16, dtype=torch.float64), torch.randn(2, 2, 90, 16, dtype=torch.float64)
    indices, counts, heavy = torch.ops.tsa.select_tokens(q, k, None, None, *NUMBERS, share="group")
    own = torch.ops.tsa.select_tokens(q, k, None, None, *NUMBERS)
    assert torch.equal(counts, own[1])
    n = int(counts[0])
    assert (own[0][:, :4, :n] != indices[:, :1, :n]).any()
    for b in range(2):
        for g in range(2):
            scores = torch.zeros(82, dtype=torch.float64)
            for h in range(4 * g, 4 * g + 4):
                attention = q[b, h, -8:] @ k[b, g].T * 0.25
                attention = attention.masked_fill(torch.arange(90) > torch.arange(82, 90)[:, None], -torch.inf).softmax(-1)
                scores += torch.nn.functional.avg_pool1d(attention[:, :82].mean(0)[None], 3, 1, 1)[0]
            n = int(counts[b])
            assert indices[b, g, :n].tolist() == sorted(scores.topk(n - 8).indices.tolist()) + list(range(82, 90))
            assert heavy[b, g].tolist() == sorted(scores.topk(4).indices.tolist())
    assert indices.shape == (2, 2, 90)
    assert heavy.shape == (2, 2, 4)


def test_without_groups_it_changes_nothing():
    q, k = torch.randn(2, 4, 80, 16), torch.randn(2, 4, 80, 16)
    shared = torch.ops.tsa.select_tokens(q, k, None, None, *NUMBERS, share="group")
    assert all(map(torch.equal, shared, torch.ops.tsa.select_tokens(q, k, None, None, *NUMBERS)))


@pytest.mark.parametrize("k_len", [24, 80])
def test_padding_and_short_rows(k_len):
    """A row of 24 tokens keeps all of them, in one list a group; a padded row gives what it gives alone."""
    q, k = torch.randn(2, 4, k_len, 16), torch.randn(2, 2, k_len, 16)
    mask = torch.arange(k_len) >= torch.tensor([[0], [7]])
    indices, counts, heavy = torch.ops.tsa.select_tokens(q, k, *order(mask), *NUMBERS, share="group")
    alone = torch.ops.tsa.select_tokens(q[1:, :, 7:], k[1:, :, 7:], None, None, *NUMBERS, share="group")
    assert indices.shape == (2, 2, k_len)
    n = int(counts[1])
    assert n == int(alone[1][0])
    assert torch.equal(indices[1, :, :n], alone[0][0, :, :n] + 7)
    assert torch.equal(heavy[1], torch.where(alone[2][0] >= 0, alone[2][0] + 7, -1))


def test_a_transformed_model_uses_it():
    model = tsa.transform(tiny_llama(), dataclasses.replace(SPARSE, share="group"), fullgraph=True)
    with torch.no_grad():
        shared = model(input_ids=(ids := token_ids(100)), use_cache=False).logits
        attached(model).plan = tsa.Plan(SPARSE)
        own = model(input_ids=ids, use_cache=False).logits
    assert not torch.allclose(shared, own)


def test_exports_refuse_it_by_name():
    from tsa_compile.export.common import ExportError
    from tsa_compile.export.trace import trace

    policy = tsa.TokenSparse(share="group", window=8, min_tokens=8)
    with pytest.raises(ExportError, match=r"TokenSparse\.share is 'group'"):
        trace(tiny_llama(), (token_ids(60),), {"use_cache": False}, policy=policy)


@pytest.mark.parametrize("value", ["heads", None, 2])
def test_a_bad_value_is_named(value):
    with pytest.raises(ValueError, match=r"TokenSparse\.share must be one of .* got"):
        tsa.TokenSparse(share=value)
    if isinstance(value, str):
        with pytest.raises(ValueError, match=r"tsa::select_tokens: share must be one of .* got 'heads'"):
            torch.ops.tsa.select_tokens(torch.randn(1, 2, 8, 16), torch.randn(1, 1, 8, 16), None, None, *NUMBERS, share=value)
