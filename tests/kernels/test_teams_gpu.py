"""Sampled teams on a GPU: bf16 at length, the draws of the reference, replays of CUDA graphs, nothing compiled for a length."""

from __future__ import annotations

import pytest
import torch

from tsa_compile.kernels import ops  # noqa: F401
from tsa_compile.kernels.attend.sampled.teams import team_attention_reference
from tsa_compile.kernels.state.append_teams.reference import page_teams_reference

pytestmark = pytest.mark.gpu


def operands(length, batch=2, heads=8, kv_heads=2, dim=128):
    """Keys and queries in whole numbers, so that no rounding moves a draw or a team."""
    new = lambda h, n: torch.randint(-2, 3, (batch, h, n, dim), device="cuda").to(torch.bfloat16)  # noqa: E731
    return new(heads, 1), new(kv_heads, length), torch.randn(batch, kv_heads, length, dim, device="cuda", dtype=torch.bfloat16)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def test_teams_are_those_of_the_reference():
    k = operands(5000)[1]
    start, lengths = int32(0, 777), int32(5000, 4000)
    got = torch.ops.tsa.page_teams(k, None, 1, start, lengths, None, 4)
    want = page_teams_reference(k.cpu(), None, 1, start.cpu(), lengths.cpu(), None, 4)
    assert torch.equal(got.cpu()[0, :, :312], want[0, :, :312])
    assert torch.equal(got.cpu()[1, :, :298], want[1, :, :298])


@pytest.mark.parametrize(("length", "draws"), [(3000, 32), (40_000, 256), (40_000, 4096)])
def test_triton_draws_what_the_reference_draws(length, draws):
    q, k, v = operands(length)
    lengths, seed = int32(length, length - 1234), torch.tensor([7], device="cuda")
    teams = torch.ops.tsa.page_teams(k, None, 1, None, lengths, None, 4)
    given = (None, 1, None, lengths, None, 0.05, seed, draws, 4)
    out, lse = torch.ops.tsa.team_attention(q, k, v, teams, *given)
    want, want_lse = team_attention_reference(q.float(), k.float(), v.float(), teams, *given)
    assert ((out.double() - want).norm() <= 1e-2 * want.norm()).item()
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-3)


def test_replays_follow_lengths_and_seeds_without_waiting():
    q, k, v = operands(4096)
    lengths, seed = int32(3000, 2000), torch.tensor([1], device="cuda")
    teams = torch.ops.tsa.page_teams(k, None, 1, None, None, None, 4)
    run = lambda: torch.ops.tsa.team_attention(q, k, v, teams, None, 1, None, lengths, None, 0.05, seed, 32, 2)  # noqa: E731
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
        want = team_attention_reference(q, k, v, teams, None, 1, None, lengths, None, 0.05, seed, 32, 2)
        assert ((out.double() - want[0]).norm() <= 1e-2 * want[0].norm()).item()
        torch.testing.assert_close(lse, want[1], rtol=1e-4, atol=1e-3)


def test_no_length_compiles_anything():
    import triton

    def run(capacity):
        q, k, v = operands(capacity)
        lengths = torch.full((2,), capacity, dtype=torch.int32, device="cuda")
        teams = torch.ops.tsa.page_teams(k, None, 1, None, lengths, None, 4)
        torch.ops.tsa.team_attention(q, k, v, teams, None, 1, None, lengths, None, 0.1, torch.tensor([1], device="cuda"), 32, 4)

    run(4096), run(64)
    compiled, knobs = [], triton.knobs.runtime
    before, knobs.jit_post_compile_hook = knobs.jit_post_compile_hook, lambda **told: compiled.append(told["repr"])
    try:
        for capacity in (1000, 70, 50_001):
            run(capacity)
    finally:
        knobs.jit_post_compile_hook = before
    assert compiled == []
