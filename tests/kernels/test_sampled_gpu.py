"""Sampled values on a GPU: one graph for all lengths and seeds, no wait for the device, no kernel compiled for a new length."""

import pytest
import torch

from tsa_compile.kernels import ops  # noqa: F401
from tsa_compile.kernels.attend.sampled.reference import sampled_value_attention_reference

pytestmark = pytest.mark.gpu
FORMS = ("prop", "flash")


def operands(capacity, batch=2):
    """Scores that are whole numbers, so that no rounding moves a draw."""
    q = torch.randint(-2, 3, (batch, 8, 1, 64), device="cuda").bfloat16()
    k = torch.randint(-1, 2, (batch, 2, capacity, 64), device="cuda").bfloat16()
    return q, k, torch.randn(batch, 2, capacity, 64, device="cuda", dtype=torch.bfloat16)


def reference(*given):
    """(out, lse) in float64, on the CPU: no kernel computes in float64."""
    exact = [x.cpu() if isinstance(x, torch.Tensor) else x for x in given]
    return [x.cuda() for x in sampled_value_attention_reference(*(x.double() for x in exact[:3]), *exact[3:])]


@pytest.mark.parametrize("form", FORMS)
def test_graph_replay_serves_all_lengths_and_seeds_and_nothing_waits(form):
    x, seed = operands(4096), torch.tensor([3], device="cuda")
    lengths = torch.tensor([100, 7], dtype=torch.int32, device="cuda")
    run = lambda: torch.ops.tsa.sampled_value_attention(*x, None, 1, None, lengths, None, 0.125, seed, 32, form)  # noqa: E731
    run()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            out, lse = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for values, number in (((4096, 1), 5), ((3333, 0), 6), ((64, 65), -1)):
        lengths.copy_(torch.tensor(values, dtype=torch.int32))
        seed.fill_(number)
        out.fill_(torch.nan)
        graph.replay()
        want = reference(*x, None, 1, None, lengths, None, 0.125, seed, 32, form)
        assert ((out.double() - want[0]).norm() <= 1e-2 * want[0].norm()).item()
        torch.testing.assert_close(lse, want[1], rtol=1e-4, atol=1e-4)


def test_no_length_compiles_anything():
    import triton

    def run(capacity):
        for form in FORMS:
            for length in (1, 64, capacity):
                lengths = torch.full((2,), length, dtype=torch.int32, device="cuda")
                seed = torch.tensor([1], device="cuda")
                torch.ops.tsa.sampled_value_attention(*operands(capacity), None, 1, None, lengths, None, 0.1, seed, 32, form)

    run(4096), run(64)
    compiled, knobs = [], triton.knobs.runtime
    before, knobs.jit_post_compile_hook = knobs.jit_post_compile_hook, lambda **told: compiled.append(told["repr"])
    try:
        for capacity in (1000, 70, 100_001):
            run(capacity)
    finally:
        knobs.jit_post_compile_hook = before
    assert compiled == []


@pytest.mark.parametrize("form", FORMS)
def test_offsets_beyond_two_to_the_31st(form):
    q = operands(16, batch=1)[0]
    k, v = (torch.zeros(1, 140_000, 256, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2)[:, 254:] for _ in range(2))
    k.copy_(operands(140_000, batch=1)[1]), v.normal_()
    given = (None, 1, None, None, None, 0.125, torch.tensor([1], device="cuda"), 128, form)
    got = torch.ops.tsa.sampled_value_attention(q, k, v, *given)[0]
    want = reference(q, k, v, *given)[0]
    assert ((got.double() - want).norm() <= 1e-2 * want.norm()).item()
