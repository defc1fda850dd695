"""Block-causal attention with bridges: reference and Triton read exactly the keys named, in float64's judgement."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.page_cases import SHAPES, dense_attention, make_case, moved
from tests.kernels.test_prefill_views import scattered
from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.common.row_blocks import valid_keys, valid_range
from tsa_compile.kernels.edges import Edges

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float16: 1.5e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5}
attend = torch.ops.tsa.bridge_attention
RULES = {  # width, rows, sources, offset
    "fixed": (64, 0, 0, 0),
    "bridge": (48, 7, 13, 0),
    "source-extended": (50, 16, 50, 20),
    "overlapping": (32, 32, 40, 31),
    "one block": (1000, 3, 5, 0),
    "single rows": (1, 1, 2, 0),
}


@pytest.fixture(autouse=True)
def _poisoned():
    """Fresh memory holds NaN, so an element that no kernel wrote fails."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def named_keys(case, rule) -> torch.Tensor:
    """Which keys each row reads, from `Edges`, one row after the other: bool `[B, 1, Lq, Lk]`."""
    (batch, _, q_len, _), k_len = case.q.shape, case.k.shape[2]
    first, end = valid_range(batch, k_len, case.start, case.lengths, case.q.device)
    seen = torch.zeros(batch, 1, q_len, k_len, dtype=torch.bool)
    for b, begin in enumerate(first.tolist()):
        for row in range(q_len):
            t = row + k_len - q_len - begin  # from the batch row's first key on
            for near, far in Edges.bridges(*rule).spans[t % rule[0]] if t >= 0 else ():
                seen[b, 0, row, begin + max(0, t - far) : begin + t - near + 1] = True
    return seen & valid_keys(k_len, first, end, case.key_mask).cpu()[:, None, None]


def check(case, rule, out, lse, tolerance) -> None:
    want, want_lse = dense_attention(case, named_keys(moved(case, torch.float64, "cpu"), rule))
    assert float((out.cpu().double() - want).norm() / want.norm()) < tolerance
    hidden = want_lse == -torch.inf
    assert torch.equal(lse.cpu() == -torch.inf, hidden)
    assert (out.cpu()[hidden] == 0).all()
    torch.testing.assert_close(lse.cpu().double()[~hidden], want_lse[~hidden], rtol=0, atol=max(tolerance, 1e-6) * 10)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("shape", "rule"),
    [*((shape, "bridge") for shape in SHAPES), *((s, rule) for s in ("chunk", "both, a chunk") for rule in RULES)],
)
def test_the_reference_reads_the_keys_named(shape, rule):
    case = make_case(**SHAPES[shape])
    out, lse = attend(*case[:3], None, 1, *case.padding, case.scale, *RULES[rule], True)
    check(case, RULES[rule], out, lse, 1e-12)


def test_a_padded_row_gives_what_it_gives_alone_and_chunks_what_the_whole_gives():
    case, rule = make_case(390, 390, batch=2, padding="left"), RULES["bridge"]
    padded = attend(*case[:3], None, 1, *case.padding, case.scale, *rule, False)[0]
    n = int(case.start[1])
    alone = attend(*(x[1:, :, n:] for x in case[:3]), None, 1, None, None, None, case.scale, *rule, False)[0]
    torch.testing.assert_close(padded[1:, :, n:], alone, rtol=1e-12, atol=1e-12)
    chunks = [
        attend(case.q[:, :, a:b], *(x[:, :, :b] for x in case[1:3]), None, 1, case.start, None, None, case.scale, *rule, False)[0]
        for a, b in ((0, 100), (100, 101), (101, 390))
    ]
    torch.testing.assert_close(torch.cat(chunks, 2), padded, rtol=1e-12, atol=1e-12)


def test_one_block_is_dense_and_bridges_merge_with_blocks():
    """Source: the repair is the merge of block-causal attention and of the attention to the keys before each block."""
    case = make_case(q_len=200, k_len=200)
    rest = (None, 1, None, None, None, case.scale)
    dense = torch.nn.functional.scaled_dot_product_attention(*case[:3], is_causal=True, scale=case.scale, enable_gqa=True)
    torch.testing.assert_close(attend(*case[:3], *rest, 200, 0, 0, 0, False)[0], dense, rtol=1e-12, atol=1e-12)
    own = attend(*case[:3], *rest, 50, 0, 0, 0, True)
    both, lse = attend(*case[:3], *rest, 50, 50, 30, 0, True)
    bridge = named_keys(case, (50, 50, 30, 0)) & ~named_keys(case, (50, 0, 0, 0))
    out, total = dense_attention(case, bridge)
    merged = torch.ops.tsa.merge(*own, out, total.float())
    torch.testing.assert_close(merged[0], both, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merged[1], lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("rows", "dense"), [(40, True), (41, False), (200, False)])
def test_few_rows_over_a_cache_read_everything(rows, dense):
    case = make_case(rows, 200)
    rest = (None, 1, None, None, None, case.scale)
    got = attend(*case[:3], *rest, *RULES["bridge"], False, min_queries=40)[0]
    every = attend(*case[:3], *rest, 1 << 30, 0, 0, 0, False)[0]
    assert torch.equal(got, every if dense else attend(*case[:3], *rest, *RULES["bridge"], False)[0])
    assert not torch.equal(every, attend(*case[:3], *rest, *RULES["bridge"], False)[0])


@pytest.mark.parametrize("block", [16, 3])
def test_pages_that_lie_anywhere_give_what_keys_in_order_give(block):
    case, rule = make_case(**SHAPES["both, a chunk"]), RULES["bridge"]
    k, v, table = scattered(case, block)
    rest = (*case.padding, case.scale, *rule, True)
    got = attend(case.q, k, v, table, block, *rest, k_len=case.k.shape[2])
    for a, b in zip(got, attend(*case[:3], None, 1, *rest), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("need_lse", [False, True])
def test_opcheck(device, need_lse):
    case = moved(make_case(60, 70, 2, padding="both"), torch.float32, device)
    torch.library.opcheck(attend.default, (*case[:3], None, 1, *case.padding, case.scale, *RULES["bridge"], need_lse))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(width=0), "rows must be 0 to width, offset 0 to width - 1, .*; got width 0, rows 7, offset 0 and sources 13"),
        (dict(rows=49), "got width 48, rows 49"),
        (dict(offset=48), "offset 48"),
        (dict(sources=-1), "sources -1"),
        (dict(q=torch.randn(1, 4, 31, 16)), "31 queries for 30 keys"),
        (dict(q=torch.randn(1, 3, 30, 16)), "3 query heads are no multiple of 2"),
        (dict(v=torch.randn(1, 2, 30, 300)), "the head dim of v must be at most 256, got 300"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    q, k, v = (torch.randn(1, heads, 30, 16) for heads in (4, 2, 2))
    names = ("q", "k", "v", "blocks", "block", "start", "lengths", "key_mask", "scale", "width", "rows", "sources", "offset")
    given = dict(zip(names, (q, k, v, None, 1, None, None, None, 0.25, *RULES["bridge"]), strict=True))
    with pytest.raises(ValueError, match=message):
        attend(*(given | changes).values(), False)


# ---- Triton, by its interpreter where there is no GPU


@pytest.fixture(scope="module")
def host():
    pytest.importorskip("triton")
    from tsa_compile.kernels.attend.bridge import host

    return host.bridge_attention


SMALL = {  # Triton's interpreter is slow
    "chunk": dict(q_len=130, k_len=180, heads=2, kv_heads=1),
    "one row": dict(q_len=1, k_len=100, heads=2),
    "both, a chunk": dict(q_len=90, k_len=150, batch=2, heads=3, kv_heads=1, padding="both"),
    "right padding": dict(q_len=100, k_len=100, batch=2, heads=1, kv_heads=1, padding="right"),
    "holes": dict(q_len=130, k_len=140, batch=2, heads=1, kv_heads=1, padding="holes", dim=24, v_dim=40),
}


@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        *((shape, "bridge") for shape in SMALL),
        *(("chunk", rule) for rule in RULES if rule != "bridge"),
    ],
)
def test_triton_reads_the_keys_named(host, shape, rule):
    case = moved(make_case(**SMALL[shape]), torch.float32, DEVICE)
    out, lse = host(*case[:3], None, 1, *case.padding, case.scale, *RULES[rule], True)
    check(case, RULES[rule], out, lse, TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    ("dtype", "dim", "v_dim"),
    [
        (torch.float16, 64, 64),
        (torch.float16, 128, 80),
        (torch.float32, 256, 256),
        pytest.param(torch.bfloat16, 128, 128, marks=pytest.mark.gpu),
    ],
)
def test_triton_in_other_dtypes_and_head_dims(host, dtype, dim, v_dim):
    case = moved(make_case(70, 110, 1, 2, 1, dim, v_dim), dtype, DEVICE)
    out, lse = host(*case[:3], None, 1, *case.padding, case.scale, *RULES["bridge"], True)
    check(case, RULES["bridge"], out, lse, TOLERANCE[dtype])
    assert host(*case[:3], None, 1, *case.padding, case.scale, *RULES["bridge"], False)[1].shape == (0,)


def test_triton_over_pages(host):
    case, rule = moved(make_case(**SMALL["both, a chunk"]), torch.float32, DEVICE), RULES["bridge"]
    k, v, table = scattered(case, 16, per_entry=2)
    out, lse = host(case.q, k, v, table, 16, *case.padding, case.scale, *rule, True, k_len=case.k.shape[2])
    check(case, rule, out, lse, TOLERANCE[torch.float32])


def test_triton_with_nothing_to_do(host):
    q, k, v = (torch.randn(0, 2, 5, 16, device=DEVICE) for _ in range(3))
    assert host(q, k, v, None, 1, None, None, None, 0.25, *RULES["bridge"], True)[0].shape == (0, 2, 5, 16)
    with pytest.raises(ValueError, match="takes a positive scale, not 0"):
        host(q, k, v, None, 1, None, None, None, 0, *RULES["bridge"], True)


SCRIPT = """
import sys
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tsa_compile.kernels.attend.bridge.device import bridge_attention_kernel as kernel
from tsa_compile.kernels.common.tiles import strip_config

types = {"lse": "*fp32", "starts": "*i32", "lengths": "*i32", "key_mask": "*i1", "blocks": "*i32", "scale_log2": "fp32"}
types |= {name: "*bf16" for name in ("q", "k", "v", "out")}
names = [p.name for p in kernel.params]
for capability in map(int, sys.argv[1:]):
    viewed = capability == 90
    config = strip_config(128, torch.bfloat16, divmod(capability, 10))
    flags = dict(START=viewed, LENGTH=viewed, MASK=viewed, LSE=viewed) | ({} if viewed else {"blocks": None})
    shape = dict(D=128, DV=128, BLOCK_D=128, BLOCK_DV=128, BLOCK_M=config.block_m, BLOCK_N=config.block_n, PRECISION="ieee")
    constants = shape | flags
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    wide = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*" or n[1:3] == "_s"}
    source = ASTSource(kernel, signature, constants, wide)
    assert triton.compile(source, target=GPUTarget("cuda", capability, 32), options=config.options).asm["cubin"]
print("compiled")
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["90", "80"])
def test_compiles_ahead_of_time(capability, tmp_path):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", SCRIPT, capability], cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout.strip().endswith("compiled"), done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("dim", "v_dim"), [(64, 64), (128, 128), (80, 96), (256, 256)])
def test_large(host, dtype, dim, v_dim):
    case = moved(make_case(900, 1500, 2, 8, 2, dim, v_dim, padding="both"), dtype, "cuda")
    rule = (256, 32, 40, 100)
    check(case, rule, *host(*case[:3], None, 1, *case.padding, case.scale, *rule, True), TOLERANCE[dtype])


@pytest.mark.gpu
def test_no_synchronisation_graph_replay_and_no_recompile():
    from tsa_compile.kernels.attend.bridge.device import bridge_attention_kernel

    def run(case):
        return attend(*case[:3], None, 1, *case.padding, case.scale, *RULES["bridge"], True)[0]

    case = moved(make_case(1500, 1500, 2, 8, 2, 128, padding="left"), torch.bfloat16, "cuda")
    want = run(case)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = run(case)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    got.fill_(-7)
    graph.replay()
    assert torch.equal(got, want)
    compiled = lambda: sum(len(c[0]) for c in bridge_attention_kernel.device_caches.values())  # noqa: E731
    before = compiled()
    for length in (500, 777, 1024, 2048):
        run(moved(make_case(length, length, 2, 8, 2, 128, padding="left"), torch.bfloat16, "cuda"))
    assert compiled() == before
