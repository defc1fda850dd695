"""Token-sparse attention on a GPU: dtypes and shapes against float64, no synchronisation, graphs, no recompiles."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.kernels.flat import sparse_attention
from tsa_compile.kernels.attend.tokens import chunks, engines, hopper
from tsa_compile.kernels.attend.tokens.definition import sparse_attention_oracle

_spec = importlib.util.spec_from_file_location("sparse_prefill_cases", Path(__file__).with_name("test_sparse_prefill.py"))
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

pytestmark = pytest.mark.gpu
# ||out - ref|| / ||ref||: rounding of the output (and of p before the second product) in half types; tf32x3 in float32
TOLERANCE = {torch.float16: 1.5e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5}
HALF_TYPES = [torch.float16, torch.bfloat16]  # their softmax differs: only bfloat16 has room for weights above 1
LARGE = dict(lengths=[1500, 700, 1100], k_len=1500, q_len=1500, heads=8, kv_heads=2, dim=64)


def on_gpu(args):
    return tuple(None if x is None else x.cuda() for x in args)


def needs_own_packed_kernel(args):
    if not hopper.takes(*(x.half().cuda() for x in args[:3])):
        pytest.skip("not Hopper, whose kernel reads packed rows of any call")


def relative_error(args, strip, engine, dtype):
    """Runs the engine with poisoned allocations and compares it with the float64 definition on the same inputs."""
    args = on_gpu(x.to(dtype) if x is not None and x.is_floating_point() else x for x in args)
    exact = (*(x.double() for x in args[:3]), *args[3:])
    expected = sparse_attention_oracle(*exact, 0.3, *strip, 0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    try:
        result = sparse_attention(*args, 0.3, *strip, 0, engine)
    finally:
        torch.use_deterministic_algorithms(False)
    assert result.transpose(1, 2).is_contiguous()
    padding_or_unread = expected.abs().amax(-1) == 0
    assert (result[padding_or_unread] == 0).all()
    return float((result.double() - expected).norm() / expected.norm().clamp(min=1e-30))


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("strip", [(0, 0, 0), (16, 4, 8), (0, 3, 5)], ids=str)
@pytest.mark.parametrize("dim", [None, 64, 128])
@pytest.mark.parametrize("case", cases.RAGGED)
def test_fused_ragged(case, dim, strip, dtype):
    args = cases.make_case(**(case if dim is None else {**case, "dim": dim, "v_dim": dim}), heavy=strip[2])
    assert relative_error(args, strip[:2], "fused", dtype) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("dim", "v_dim"), [(64, 64), (80, 80), (96, 128), (128, 128), (256, 256)])
def test_fused_dtypes_and_head_dims(dim, v_dim, dtype):
    args = cases.make_case(**{**LARGE, "dim": dim, "v_dim": v_dim}, heavy=32, padding="holes")
    for strip in ((0, 0), (100, 4)):
        given = args if strip[0] else (*args[:5], args[5][..., :0], args[6])
        assert relative_error(given, strip, "fused", dtype) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("strip", [(0, 0), (16, 4)])
@pytest.mark.parametrize("engine", ["fused", "packed"])
def test_many_short_rows(strip, engine, dtype):
    """Each program computes several tiles of one key block in a row: who loads may run ahead of who computes."""
    args = cases.make_case(lengths=[300] * 40, k_len=300, q_len=300, heads=8, kv_heads=2, dim=64, heavy=8 if strip[0] else 0)
    if engine == "packed":
        needs_own_packed_kernel(args)
    for _ in range(3):
        assert relative_error(args, strip, engine, dtype) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("engine", ["fused", "packed"])
def test_tiles_from_a_queue(engine, dtype, monkeypatch):
    """As long prompts take them: more tiles than programs, each by whoever is free."""
    monkeypatch.setattr(hopper, "QUEUED_FROM", 0)
    args = cases.make_case(lengths=[1500, 0, 1100], k_len=1500, q_len=1500, heads=32, kv_heads=8, dim=128, padding="holes")
    needs_own_packed_kernel(args)
    for _ in range(3):
        assert relative_error(args, (0, 0), engine, dtype) < TOLERANCE[dtype]


@pytest.mark.parametrize("queued_from", [0, 1 << 20])
@pytest.mark.parametrize("growth", [20, 60, 400])
@pytest.mark.parametrize("strip", [(0, 0), (100, 4)])
@pytest.mark.parametrize(("engine", "dim"), [("fused", 64), ("fused", 128), ("packed", 64), ("packed", 128)])
def test_scores_far_above_those_of_the_first_block(engine, dim, strip, growth, queued_from, monkeypatch):
    """Early keys, which a tile comes to last, whose exponentials pass what is allowed, or infinity: such tiles are done again,
    among others that are not."""
    monkeypatch.setattr(hopper, "QUEUED_FROM", queued_from)
    case = dict(lengths=[1500, 0, 1100, 100], k_len=1500, q_len=1500, heads=16, kv_heads=8, keep=0.7, padding="right")
    args = cases.make_case(**case, dim=dim, heavy=8 if strip[0] else 0)
    args[1][0, ::2, :40] *= growth  # a batch entry and heads of which only some
    args[1][2, :, 200:203] *= growth
    if engine == "packed":
        needs_own_packed_kernel(args)
    for _ in range(2):
        assert relative_error(args, strip, engine, torch.bfloat16) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
@pytest.mark.parametrize("per_query_head", [True, False])
def test_packed(layout, per_query_head, dim, monkeypatch):
    """With several chunks of heads, and with the strip."""
    case = {**LARGE, "dim": dim, "layout": layout, "per_query_head": per_query_head}
    args = cases.make_case(**case, heavy=32, padding="holes")
    if not engines.can_pack(*(x.half().cuda() for x in args[:3])):
        pytest.skip(f"head dim {dim}: nothing to run on packed rows")
    for chunk_bytes in (chunks.CHUNK_BYTES, 1):
        monkeypatch.setattr(chunks, "CHUNK_BYTES", chunk_bytes)
        for strip in ((0, 0), (100, 4)):
            given = args if strip[0] else (*args[:5], args[5][..., :0], args[6])
            assert relative_error(given, strip, "packed", torch.bfloat16) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("strip", [(0, 0, 0), (16, 4, 8)], ids=str)
@pytest.mark.parametrize("case", cases.RAGGED)
def test_packed_ragged(case, strip, dtype):
    args = cases.make_case(**{**case, "dim": 64, "v_dim": 64}, heavy=strip[2])
    needs_own_packed_kernel(args)
    assert relative_error(args, strip[:2], "packed", dtype) < TOLERANCE[dtype]


def test_dense_hint():
    args = cases.make_case(lengths=[700, 700], k_len=700, q_len=700, keep=1, dim=64, dtype=torch.float16)
    args = on_gpu(args)
    expected = sparse_attention(*args, 0.125, 64, 4, 0, "fused")
    result = sparse_attention(*args, 0.125, 64, 4, 700, "auto")
    assert result.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(result, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("engine", ["auto", "fused", "packed"])
@pytest.mark.parametrize("strip", [(0, 0), (64, 4)])
def test_no_synchronisation_and_graph_replay(engine, strip):
    """The whole call runs with synchronisation forbidden; a captured graph follows new inputs and new counts."""
    first, second = (
        on_gpu(cases.make_case(**LARGE, keep=keep, heavy=16 if strip[0] else 0, dtype=torch.bfloat16, seed=seed))
        for keep, seed in ((0.5, 1), (0.2, 2))
    )
    if engine == "packed":
        needs_own_packed_kernel(first)
    static = [x.clone() for x in first]
    sparse_attention(*static, 0.125, *strip, 0, engine)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sparse_attention(*static, 0.125, *strip, 0, engine)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = sparse_attention(*static, 0.125, *strip, 0, engine)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for to, new in zip(static, second, strict=True):
        to.copy_(new)
    graph.replay()
    assert torch.equal(result, sparse_attention(*second, 0.125, *strip, 0, engine))


@pytest.mark.parametrize("engine", ["fused", "packed"])
def test_new_lengths_compile_nothing(engine):
    from tsa_compile.kernels.attend.tokens.device import sparse_prefill_kernel
    from tsa_compile.kernels.attend.tokens.hopper_device import sparse_prefill_hopper_kernel
    from tsa_compile.kernels.attend.tokens.pack_device import invert_kernel, pack_kernel
    from tsa_compile.kernels.attend.tokens.strip_device import strip_kernel
    from tsa_compile.kernels.common.ranks_device import order_kernel

    def run(length):
        case = dict(lengths=[length, length // 2], k_len=length, q_len=length, heads=8, dim=64, heavy=16)
        args = on_gpu(cases.make_case(**case, dtype=torch.bfloat16))
        if engine == "packed":
            needs_own_packed_kernel(args)
        sparse_attention(*args, 0.125, 64, 4, 0, engine)
        return sparse_prefill_hopper_kernel if hopper.takes(*args[:3]) else sparse_prefill_kernel

    run(512)
    kernels = (run(777), strip_kernel, invert_kernel, order_kernel, *([pack_kernel] if engine == "packed" else ()))

    def compiled():
        return [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]

    before = compiled()
    assert min(before) > 0
    for length in (129, 200, 333, 512, 640, 1000, 1024, 1025, 1500, 2048):
        run(length)
    assert compiled() == before
