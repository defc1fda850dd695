"""Masks in buffers: proven from their values, and never trusted after a change."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.api.tiny import KEEP_ALL
from tsa_compile.backend import Backend
from tsa_compile.plan import Plan

SIZE, LENGTH, DIM = 32, 20, 16


def tril(**options):
    return torch.ones(SIZE, SIZE, **options).tril()


class Attention(nn.Module):
    """softmax(q k^T + mask) v of the last queries, the mask read from a buffer by `read(scores, buffer)`."""

    def __init__(self, buffer, read, past=0):
        super().__init__()
        self.register_buffer("bias", buffer)
        self.read, self.past = read, past

    def forward(self, x):
        q, k, v = x.unbind(0)
        q = q[:, :, self.past :]
        scores = self.read(q @ k.mT * DIM**-0.5, self.bias)
        return scores.softmax(-1) @ v


def filled(scores, bias):
    """minGPT, GPT-Neo"""
    return scores.masked_fill(bias[..., : scores.shape[-2], : scores.shape[-1]] == 0, float("-inf"))


def chosen(scores, bias):
    """ImageGPT, GPT-2 of old: rows of the last queries."""
    rows, columns = scores.shape[-2:]
    return torch.where(bias[:, :, columns - rows : columns, :columns], scores, torch.finfo(scores.dtype).min)


def added(scores, bias):
    """Whisper and CLIP by OpenAI"""
    return scores + bias[: scores.shape[-2], : scores.shape[-1]]


def minus_infinity(allowed):
    return torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))


def qkv(length=LENGTH):
    """One tensor, so that their lengths are one symbol, as in a model."""
    return torch.randn(3, 2, 3, length, DIM)


class Run:
    """A module compiled with our backend."""

    def __init__(self, module):
        torch._dynamo.reset()
        self.module, self.backend = module, Backend(Plan(KEEP_ALL), "eager")
        self.compiled = torch.compile(module, backend=self.backend, fullgraph=True)

    def check(self, x):
        """Right, whatever was done to it; returns whether the newest graph was replaced."""
        with torch.no_grad():
            torch.testing.assert_close(self.compiled(x), self.module(x), atol=2e-6, rtol=2e-5, equal_nan=True)
        return self.backend.report.sites[-1].replaced

    @property
    def reason(self):
        return self.backend.report.sites[-1].reason


PROVEN = {
    "float, a view": (tril().view(1, 1, SIZE, SIZE), filled),
    "bytes": (tril(dtype=torch.uint8), filled),
    "bool, chosen": (tril(dtype=torch.bool)[None, None], chosen),
    "added": (minus_infinity(tril(dtype=torch.bool)), added),
}
REFUSED = {
    "a hole": (tril().index_put((torch.tensor(9), torch.tensor(4)), torch.tensor(0.0)), filled),
    "a diagonal further": (torch.ones(SIZE, SIZE).tril(1), filled),
    "a diagonal less": (torch.ones(SIZE, SIZE).tril(-1) + torch.eye(SIZE)[:1] * (torch.arange(SIZE) == 0)[:, None], filled),
    "a window": (tril() - torch.ones(SIZE, SIZE).tril(-5), filled),
    "a window above the diagonal": (torch.ones(SIZE, SIZE).triu(2) - torch.ones(SIZE, SIZE).triu(5), filled),
    "two holes": (tril().index_put((torch.tensor([9, 31]), torch.tensor([4, 0])), torch.tensor(0.0)), filled),
    "upper": (tril().T.contiguous(), filled),
    "small numbers added": (tril() * 0.1, added),
    "data": (torch.randn(SIZE, SIZE), added),
}


@pytest.mark.parametrize("name", PROVEN)
def test_a_causal_buffer_is_proven(name):
    run = Run(Attention(*PROVEN[name]))
    assert run.check(qkv()), run.reason
    assert run.check(qkv(27)), run.reason  # symbolic from here on
    assert run.check(qkv(9)), run.reason


def test_rows_of_the_last_queries():
    assert Run(Attention(*PROVEN["bool, chosen"], past=8)).check(qkv(28))


@pytest.mark.parametrize("name", REFUSED)
def test_any_other_buffer_stays_dense(name):
    run = Run(Attention(*REFUSED[name]))
    assert not run.check(qkv())
    assert run.reason


def test_a_window_is_recognised():
    """GPT-Neo's local layers."""
    run = Run(Attention(*REFUSED["a window"]))
    run.check(qkv())
    assert run.reason == "sliding window of 5: already local"


def test_a_mask_from_the_caller_is_data():
    torch._dynamo.reset()
    backend = Backend(Plan(KEEP_ALL), "eager")
    f = torch.compile(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), backend=backend)
    f(*qkv(), torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())
    assert not backend.report.sites[0].replaced


def change(bias):
    bias[..., 3:, 1] = 0


def test_a_write_is_seen(caplog):
    run = Run(Attention(*PROVEN["float, a view"]))
    assert run.check(qkv())
    change(run.module.bias)
    with caplog.at_level(logging.WARNING, "tsa_compile"):
        run.check(qkv())
    assert "bias_: changed since its values were read" in caplog.text
    assert "changed since" in run.reason
    assert "changed since" in run.backend.report.warnings[0]
    run.module.bias.copy_(tril())
    run.check(qkv())


def test_a_new_tensor_is_seen():
    run = Run(Attention(*PROVEN["float, a view"]))
    assert run.check(qkv())
    changed = run.module.bias.clone()
    change(changed)
    run.module.bias = changed
    run.check(qkv())


def test_the_same_values_again_stay_sparse(caplog):
    run = Run(Attention(*PROVEN["float, a view"]))
    assert run.check(qkv())
    run.module.load_state_dict(run.module.state_dict())
    assert run.check(qkv())
    run.module.bias = tril()[None, None]
    assert run.check(qkv())
    assert "changed" not in caplog.text


def test_another_dtype_is_compiled_anew():
    run = Run(Attention(*PROVEN["float, a view"]))
    assert run.check(qkv())
    run.module.double()
    assert run.check(qkv().double())


def test_a_buffer_that_the_graph_writes_stays_dense():
    def write(scores, bias):
        bias.mul_(1.0)
        return filled(scores, bias)

    assert not Run(Attention(tril(), write)).check(qkv())


def test_a_tensor_of_inference_mode_stays_dense():
    with torch.inference_mode():
        buffer = tril()
    run = Run(Attention(buffer, filled))
    assert not run.check(qkv())


def test_with_inductor_and_transform():
    import tsa_compile as tsa

    module = Attention(*PROVEN["float, a view"])
    expected = module(x := qkv())
    torch._dynamo.reset()
    tsa.transform(module, KEEP_ALL, compiler="inductor")
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected, atol=2e-6, rtol=2e-5)
        assert tsa.report(module).sites[0].replaced
        change(module.bias)
        changed = module(x)
    tsa.restore(module)
    torch.testing.assert_close(changed, module(x), atol=2e-6, rtol=2e-5)
