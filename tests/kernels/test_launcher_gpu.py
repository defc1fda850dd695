"""Remembered launches on a GPU: other alignments, streams, graphs and devices after the first; Triton is asked no second time."""

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import JITFunction

from tsa_compile.tools.bench.host_time import decode_forms, prefill_forms

pytestmark = pytest.mark.gpu
RULE = ([1e-6], 128, 256, 4, 128)  # every key block, whatever the rounding of scores
FORMS = ["BlockSparse", "BlockSparse, padded", "TokenSparse", "TokenSparse.paper"]


def qkv(length, device="cuda", dtype=torch.bfloat16, dim=64):
    g = torch.Generator().manual_seed(length)
    draw = lambda heads: torch.randn(1, length, heads, dim, generator=g).to(device, dtype).transpose(1, 2)  # noqa: E731
    return draw(4), draw(2), draw(2)


def attend(q, k, v):
    return torch.ops.tsa.block_sparse_attention(q, k, v, None, 1, None, None, None, 0.125, *RULE)


def expected(q, k, v):
    return attend(*(x.float().cpu() for x in (q, k, v)))


def close(got, want):
    error = (got.float().cpu() - want).norm() / want.norm()
    assert error < 2e-2, error


@torch.no_grad()
@pytest.mark.parametrize("form", [*FORMS, "decode, exact", "decode, pages"])
def test_triton_is_asked_once(form, monkeypatch):
    work = {**prefill_forms(2048, "cuda"), **decode_forms(2048, "cuda")}[form]
    first = work()
    monkeypatch.setattr(JITFunction, "run", lambda *_, **__: pytest.fail("Triton was asked again"))
    again = work()
    pairs = zip(first, again, strict=True) if isinstance(first, tuple) else [(first, again)]
    for one, other in pairs:
        torch.testing.assert_close(other, one, rtol=1e-2, atol=1e-2, equal_nan=True)


@torch.no_grad()
def test_other_alignments_and_lengths_after_the_first():
    q, k, v = qkv(600)
    want = expected(q, k, v)
    close(attend(q, k, v), want)
    for shift in (1, 8, 3):  # elements of 2 bytes: kernels differ by whether addresses are multiples of 16
        room = [x.new_empty(x.numel() + shift)[shift:].view(1, 600, -1, 64).transpose(1, 2) for x in (q, k, v)]
        moved = [to.copy_(x) for to, x in zip(room, (q, k, v), strict=True)]
        close(attend(*moved), want)
        close(attend(*moved), want)
    for length in (601, 128, 1000):
        other = qkv(length)
        close(attend(*other), expected(*other))
    close(attend(q, k, v), want)


@torch.no_grad()
def test_streams_and_graphs():
    q, k, v = qkv(900)
    want = attend(q, k, v)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = attend(q, k, v)
    side.synchronize()
    assert torch.equal(got, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(q, k, v)
    for _ in range(3):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, want)


@torch.no_grad()
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_devices_in_turns():
    here, there = qkv(700, "cuda:0"), qkv(700, "cuda:1")
    want = expected(*here)
    for _ in range(3):
        close(attend(*here), want)
        close(attend(*there), want)
