"""`tsa.compare`: both forms on the same inputs, and the model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tsa_compile as tsa
from tests.api.tiny import KEEP_ALL, SPARSE, tiny_llama, token_ids
from tsa_compile.check import compare_logits


def test_a_language_model():
    model, ids = tiny_llama(), token_ids(64)
    with torch.no_grad():
        before = model(input_ids=ids).logits
    result = tsa.compare(model, input_ids=ids, use_cache=False, policy=SPARSE, repeats=1, last=16)
    assert len(result.report.replaced) == 1
    assert all(0 < s.kept < 1 for s in result.report.replaced)
    assert result.predictions.predictions == 16
    assert result.predictions.kl > 0
    assert result.speedup == result.dense_seconds / result.sparse_seconds > 0
    assert {(s.q_len, s.k_len) for s in result.report.replaced} == {("any", "any")}
    assert " any " in str(result)
    assert f"{result.speedup:.2f}x on cpu" in str(result)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)
    tsa.transform(model, SPARSE)  # it was restored


def test_coverage_0_is_as_close_as_rounding():
    result = tsa.compare(tiny_llama(), input_ids=token_ids(64), use_cache=False, policy=KEEP_ALL, repeats=1)
    assert result.predictions.kl < 1e-9
    assert result.predictions.top1 == 1
    assert result.relative_error < 1e-5
    assert all(s.kept == 1 for s in result.report.replaced)


class Attention(nn.Module):
    def forward(self, x, as_dict=False):
        out = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True).flatten(1, 2)
        return {"y": out} if as_dict else out


def test_a_module_without_logits_has_an_error_only():
    result = tsa.compare(Attention(), torch.randn(1, 2, 40, 16), policy=KEEP_ALL, repeats=1)
    assert result.predictions is None
    assert result.relative_error < 1e-5
    assert "relative error" in result.summary()


def test_bad_arguments():
    with pytest.raises(ValueError, match="repeats and last must be at least 1, got 0 and 128"):
        tsa.compare(Attention(), torch.randn(1, 2, 8, 16), repeats=0)
    with pytest.raises(TypeError, match="got dict"):
        tsa.compare(Attention(), torch.randn(1, 2, 8, 16), True)
    model = tsa.transform(Attention())
    with pytest.raises(RuntimeError, match="restore"):
        tsa.compare(model, torch.randn(1, 2, 8, 16))
    assert tsa.report(model).sites == []


def test_logits_must_fit_and_be_finite():
    x = torch.zeros(1, 2, 8)
    with pytest.raises(ValueError, match="differ in shape"):
        compare_logits(x, x[:, :1])
    with pytest.raises(ValueError, match="not finite"):
        compare_logits(x, x / 0)
