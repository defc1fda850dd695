"""Decode on a GPU: one graph for all lengths, no wait for the device, no kernel compiled for a new length, large strides."""

import pytest
import torch

from tsa_compile.kernels import ops  # noqa: F401
from tsa_compile.kernels.attend.decode.reference import decode_attention_reference

pytestmark = pytest.mark.gpu


def cache(capacity, batch=2, kv_heads=2, dim=64):
    k, v = (torch.randn(batch, kv_heads, capacity, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return torch.randn(batch, 8, 1, dim, device="cuda", dtype=torch.bfloat16), k, v


def step(q, k, v, sums, counts, lengths):
    """Append, exact attention, and attention to a fifth of the pages."""
    view, capacity = (None, 1, None, lengths), k.shape[2]
    torch.ops.tsa.append_pages(sums, counts, k, None, 1, None, lengths - 1, lengths, None, 1)
    exact = torch.ops.tsa.decode_attention(q, k, v, *view, None, 0.1)[0]
    scores = torch.ops.tsa.page_scores(q, sums, counts, *view, capacity, 0.1)
    pages = torch.ops.tsa.select_pages(*scores, counts, *view, capacity, k.shape[1], [0.2], [0], 0.0, 1, 3)
    return exact, torch.ops.tsa.page_attention(q, k, v, *pages, *view, None, 0.1)[0], pages[1]


def test_graph_replay_serves_all_lengths_and_nothing_waits():
    q, k, v = cache(4096)
    sums, counts = torch.ops.tsa.page_sums(k, None, 1, None, None, None)
    lengths = torch.tensor([100, 7], dtype=torch.int32, device="cuda")
    step(q, k, v, sums, counts, lengths)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            out = step(q, k, v, sums, counts, lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for values in ((4096, 1), (3333, 0), (16, 17)):
        lengths.copy_(torch.tensor(values, dtype=torch.int32))
        for x in out[:2]:
            x.fill_(torch.nan)
        graph.replay()
        want = decode_attention_reference(q.double(), k.double(), v.double(), None, 1, None, lengths, None, 0.1)[0]
        assert ((out[0].double() - want).norm() <= 1e-2 * want.norm()).item()
        pages = (lengths + 15) // 16
        expected = torch.minimum(pages, torch.maximum((pages + 4) // 5, torch.tensor(4, device="cuda")))
        assert torch.equal(out[2], expected[:, None].expand(2, 2).to(torch.int32))
        assert not out[1].isnan().any()


def test_no_length_compiles_anything():
    import triton

    def run(capacity):
        q, k, v = cache(capacity)
        sums, counts = torch.ops.tsa.page_sums(k, None, 1, None, None, None)
        for length in (1, 16, capacity - 1, capacity):
            step(q, k, v, sums, counts, torch.full((2,), length, dtype=torch.int32, device="cuda"))

    run(4096), run(16)  # several parts of the keys, and one
    compiled, knobs = [], triton.knobs.runtime
    before, knobs.jit_post_compile_hook = knobs.jit_post_compile_hook, lambda **told: compiled.append(told["repr"])
    try:
        for capacity in (1000, 17, 33, 100_001):
            run(capacity)
    finally:
        knobs.jit_post_compile_hook = before
    assert compiled == []


def test_offsets_beyond_two_to_the_31st():
    """Rows of a cache `[B, L, Hk, D]` whose last element lies beyond 2**31 elements."""
    q, _, _ = cache(16, batch=1, kv_heads=2)
    k, v = (torch.zeros(1, 140_000, 256, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2)[:, 254:] for _ in range(2))
    k.normal_(), v.normal_()
    got = torch.ops.tsa.decode_attention(q, k, v, None, 1, None, None, None, 0.1)[0]
    want = decode_attention_reference(q.double(), k.double(), v.double(), None, 1, None, None, None, 0.1)[0]
    assert ((got.double() - want).norm() <= 1e-2 * want.norm()).item()
