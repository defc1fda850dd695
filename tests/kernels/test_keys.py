"""Key selection and attention to kept keys: reference against a literal float64 form, Triton against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.flat import key_attention, key_attention_reference, order, select_keys, select_keys_reference
from tsa_compile.kernels import ops  # noqa: F401
from tsa_compile.kernels.common.ranks import view_of_mask
from tsa_compile.kernels.score.probes.reference import probe_ranks, probe_scores_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SELECT = (0.3, 0.1, 8, 8)  # scale, coverage, probes, min_keys
# ||out - ref|| / ||ref||: rounding of the output, and of p before the second product, in half types; tf32x3 in float32
TOLERANCE = {torch.float16: 1.5e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5}
bf16_on_gpu = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # Triton's interpreter multiplies bf16 wrongly


def qkv(q_len=60, k_len=60, batch=2, heads=4, kv_heads=2, dim=16, v_dim=16, dtype=torch.float32, device=DEVICE, bshd=True):
    def make(h, n, d):
        x = torch.randn(batch, n, h, d).to(device, dtype).transpose(1, 2)
        return x if bshd else x.contiguous()

    return make(heads, q_len, dim), make(kv_heads, k_len, dim), make(kv_heads, k_len, v_dim)


def padding(k_len, device=DEVICE):
    """One row whole, one with holes and a padded start."""
    position = torch.arange(k_len)
    return torch.stack([position >= 0, (position >= k_len // 4) & (position % 7 != 3)]).to(device)


def literal(q, k, v, coverage, probes, min_keys, scale):
    """One row [H, n, D] without padding, in loops and float64: (outputs, kept sets)."""
    heads, n, length = q.shape[0], q.shape[1], k.shape[1]
    k, v = (x.repeat_interleave(heads // x.shape[0], 0) for x in (k, v))
    sets = [list(range(length))] * heads
    if length > min_keys + 1 and coverage > 0:
        at = [math.floor((p + 0.5) * n / probes) for p in range(probes)]
        scores = torch.stack([torch.stack([torch.softmax(scale * k[h] @ q[h, i], 0) for i in at]).mean(0) for h in range(heads)])
        mass = scores[:, :-1].sum(0)
        dropped = int((mass.sort().values.cumsum(0) < coverage * mass.sum()).sum())
        if dropped:
            n_keep = max(min_keys, length - 1 - (dropped + 1))
            order = [sorted(range(length - 1), key=lambda i, h=h: (-scores[h, i].item(), i)) for h in range(heads)]
            sets = [[*sorted(o[:n_keep]), length - 1] for o in order]
    out = torch.stack([torch.softmax(scale * q[h] @ k[h, s].T, -1) @ v[h, s] for h, s in enumerate(sets)])
    return out, sets


@pytest.mark.parametrize("case", range(16))
def test_the_reference_is_the_literal_form(case):
    g = torch.Generator().manual_seed(case)
    pick = lambda *xs: xs[int(torch.randint(len(xs), (), generator=g))]  # noqa: E731
    heads, kv_heads = pick((1, 1), (4, 2), (4, 1))
    coverage, probes, min_keys = pick(0.0, 0.05, 0.5, 0.95), pick(1, 8, 13), pick(1, 8)
    q, k, v = qkv(pick(1, 5, 40), pick(1, 9, 10, 50), 1, heads, kv_heads, v_dim=pick(8, 16), dtype=torch.float64, device="cpu")
    out, sets = literal(q[0], k[0], v[0], coverage, probes, min_keys, 0.3)
    indices, counts = torch.ops.tsa.select_keys(q, k, None, None, 0.3, coverage, probes, min_keys)
    assert indices[0, :, : counts[0]].tolist() == sets
    assert (indices[0, :, counts[0] :] == -1).all()
    torch.testing.assert_close(torch.ops.tsa.key_attention(q, k, v, indices, counts, 0.3)[0][0], out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("q_len", [60, 17])
def test_a_padded_row_gives_what_the_row_without_padding_gives(q_len):
    q, k, v = qkv(q_len, dtype=torch.float64, device="cpu")
    mask = padding(60, "cpu")
    together = torch.ops.tsa.key_attention(q, k, v, *torch.ops.tsa.select_keys(q, k, *order(mask), *SELECT), 0.3)[0]
    real = mask[1]
    rows = real if q_len == 60 else torch.ones(q_len, dtype=torch.bool)
    q, k, v = q[1:, :, rows], k[1:, :, real], v[1:, :, real]
    alone = torch.ops.tsa.key_attention(q, k, v, *torch.ops.tsa.select_keys(q, k, None, None, *SELECT), 0.3)[0]
    torch.testing.assert_close(together[1:, :, rows], alone, rtol=1e-12, atol=1e-12)


def test_coverage_zero_is_dense_attention():
    q, k, v = qkv(30, 50, v_dim=8, dtype=torch.float64, device="cpu")
    mask = padding(50, "cpu")
    got = torch.ops.tsa.key_attention(q, k, v, *torch.ops.tsa.select_keys(q, k, *order(mask), 0.3, 0.0, 8, 4), 0.3)[0]
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask[:, None, None], scale=0.3, enable_gqa=True)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


# ---- Triton, by its interpreter where there is no GPU


@pytest.fixture(scope="module")
def host():
    pytest.importorskip("triton")
    from tsa_compile.kernels.attend.keys import host as attention
    from tsa_compile.kernels.score.probes import host as select

    return select, attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, bf16_on_gpu])
@pytest.mark.parametrize(("q_len", "k_len", "dim", "probes"), [(60, 60, 16, 8), (9, 200, 80, 70), (40, 40, 256, 130)])
@pytest.mark.parametrize("padded", [False, True])
def test_probe_scores_against_float64(host, dtype, q_len, k_len, dim, probes, padded):
    q, k, _ = qkv(q_len, k_len, dim=dim, dtype=dtype)
    mask = padding(k_len) if padded else None
    view = view_of_mask(mask)
    got = host[0].probe_means(host[0].probing_queries(q, k_len, view, probes), k, view, 0.3)
    for b in range(2):
        real = mask[b] if padded else torch.ones(k_len, dtype=torch.bool, device=DEVICE)
        rows = q[b].double()[:, real] if padded and q_len == k_len else q[b].double()
        want = probe_scores_reference(rows, k[b].double()[:, real], 0.3, probes)
        torch.testing.assert_close(got[b, :, : want.shape[1]].double(), want, rtol=2e-5, atol=2e-5 / k_len)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.data())
def test_the_same_sets_as_the_reference(data):
    """Keys on a grid, so that scores of float32 and float64 order alike; ties are broken by position in both."""
    pytest.importorskip("triton")
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    q_len, k_len = data.draw(st.sampled_from([(70, 70), (3, 70), (90, 41), (1, 1), (5, 10)]))
    coverage, probes = data.draw(st.sampled_from([0.0, 0.02, 0.3, 0.9])), data.draw(st.sampled_from([1, 8, 20]))
    q, k, _ = qkv(q_len, k_len)
    k = k[:, :, torch.randint(0, max(1, k_len // 2), (k_len,))] * 2.0 if data.draw(st.booleans()) else k
    mask = torch.rand(2, k_len, device=DEVICE) < data.draw(st.sampled_from([0.0, 0.7, 1.0]))
    mask = mask if data.draw(st.booleans()) else None
    got = select_keys(q, k, mask, 0.3, coverage, probes, 8)
    want = select_keys_reference(q.double(), k.double(), mask, 0.3, coverage, probes, 8)
    for b in range(2):
        n, expected = int(got[1][b]), int(want[1][b])
        assert abs(n - expected) <= 1, (n, expected)  # a mass on the threshold may fall on either side
        assert (got[0][b, :, n:] == -1).all()
        for h in range(4):
            a, e = got[0][b, h, :n].tolist(), want[0][b, h, :expected].tolist()
            assert a == sorted(set(a))
            assert len(set(a) ^ set(e)) <= (1 if n != expected else 2), (a, e)  # two keys of one score may be swapped


def attention_error(host, q, k, v, indices, counts):
    exact = key_attention_reference(q.double(), k.double(), v.double(), indices, counts, 0.3)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    try:
        got = key_attention(q, k, v, indices, counts, 0.3)
    finally:
        torch.use_deterministic_algorithms(False)
    assert got.transpose(1, 2).is_contiguous()
    return float((got.double() - exact).norm() / exact.norm().clamp(min=1e-30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, bf16_on_gpu])
@pytest.mark.parametrize(
    ("q_len", "k_len", "dim", "v_dim"),
    [(60, 60, 16, 16), (1, 300, 80, 96), (200, 33, 64, 32), (70, 128, 72, 128), (5, 1, 16, 8)],
)
@pytest.mark.parametrize(("lists", "bshd"), [("query heads", False), ("KV heads", True)])
def test_attention_against_float64(host, dtype, q_len, k_len, dim, v_dim, lists, bshd):
    q, k, v = qkv(q_len, k_len, dim=dim, v_dim=v_dim, dtype=dtype, bshd=bshd)
    counts = torch.tensor([k_len, k_len // 2], dtype=torch.int32, device=DEVICE)  # the second row of k_len 1 keeps none
    groups = 4 if lists == "query heads" else 2
    order = torch.rand(2, groups, k_len, device=DEVICE).argsort(-1)
    indices = torch.full((2, groups, k_len), -1, dtype=torch.int32, device=DEVICE)
    for b, n in enumerate(counts.tolist()):
        indices[b, :, :n] = order[b, :, :n].sort(-1).values.int()
    assert attention_error(host, q, k, v, indices, counts) < TOLERANCE[dtype]


@pytest.mark.parametrize("q_len", [0, 4])
@pytest.mark.parametrize("k_len", [0, 4])
def test_empty(host, q_len, k_len):
    q, k, v = qkv(q_len, k_len)
    for mask in (None, torch.zeros(2, k_len, dtype=torch.bool, device=DEVICE)):
        selection = select_keys(q, k, mask, *SELECT)
        assert key_attention(q, k, v, *selection, 0.3).shape == (2, 4, q_len, 16)
        if mask is not None:
            assert selection[1].tolist() == [0, 0]
            assert (key_attention(q, k, v, *selection, 0.3) == 0).all()


# ---- the operators


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(device, masked):
    q, k, v = qkv(40, 60, v_dim=32, device=device)
    select = (q, k, *order(padding(60, device) if masked else None), *SELECT)
    torch.library.opcheck(torch.ops.tsa.select_keys.default, select)
    torch.library.opcheck(torch.ops.tsa.key_attention.default, (q, k, v, *torch.ops.tsa.select_keys(*select), 0.3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coverage": 1.0}, "select_keys: coverage must be in"),
        ({"probes": 0}, "probes and min_keys must be at least 1, got 0 and 8"),
        ({"ranks": torch.ones(2, 60, dtype=torch.int32)}, "order and ranks come together"),
        ({"order": torch.ones(2, 60), "ranks": torch.ones(2, 60)}, r"order must be int32 \(2, 60\) on cpu, got torch.float32"),
        ({"k": torch.randn(2, 3, 60, 16)}, "4 query heads are no multiple of 3"),
    ],
)
def test_bad_arguments_name_the_argument(changes, message):
    q, k, _ = qkv(device="cpu")
    names = ("q", "k", "order", "ranks", "scale", "coverage", "probes", "min_keys")
    with pytest.raises(ValueError, match=message):
        torch.ops.tsa.select_keys(*(dict(zip(names, (q, k, None, None, *SELECT), strict=True)) | changes).values())


def test_a_gradient_is_refused_with_the_operators_name():
    q, k, v = (x.requires_grad_() for x in qkv(device="cpu"))
    out = torch.ops.tsa.key_attention(q, k, v, *torch.ops.tsa.select_keys(q, k, None, None, *SELECT), 0.3)[0]
    with pytest.raises(NotImplementedError, match="tsa::key_attention is forward only"):
        out.sum().backward()


def test_probes_are_the_middles_of_equal_parts():
    assert probe_ranks(100, 4, torch.device("cpu")).tolist() == [12, 37, 62, 87]
    assert probe_ranks(2, 4, torch.device("cpu")).tolist() == [0, 0, 1, 1]


# ---- on a GPU only


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("dim", "v_dim"), [(64, 64), (80, 80), (128, 64), (256, 256)])
def test_large(host, dtype, dim, v_dim):
    q, k, v = qkv(700, 1500, heads=8, dim=dim, v_dim=v_dim, dtype=dtype)
    selection = select_keys(q, k, padding(1500), dim**-0.5, 0.3, 64, 64)
    assert int(selection[1].max()) < 1400
    assert attention_error(host, q, k, v, *selection) < TOLERANCE[dtype]


@pytest.mark.gpu
def test_no_synchronisation_graph_replay_and_no_recompile():
    from tsa_compile.kernels.attend.keys.device import key_attention_kernel, pack_keys_kernel
    from tsa_compile.kernels.score.probes.device import probe_lse_kernel

    def call(q, k, v, mask):
        return torch.ops.tsa.key_attention(q, k, v, *torch.ops.tsa.select_keys(q, k, *order(mask), 0.125, 0.3, 64, 64), 0.125)[0]

    kernels = (key_attention_kernel, pack_keys_kernel, probe_lse_kernel)

    def compiled():
        return [sum(len(c[0]) for c in kernel.device_caches.values()) for kernel in kernels]

    first, second = ((*qkv(1000, 1000, dim=64, v_dim=64, dtype=torch.bfloat16), padding(1000)) for _ in range(2))
    static = [x.clone() for x in first]
    call(*static)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call(*static)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for to, new in zip(static, second, strict=True):
        to.copy_(new)
    graph.replay()
    assert torch.equal(result, call(*second))
    before = compiled()
    for length in (500, 777, 1024, 2048):
        call(*qkv(length, length, dim=64, v_dim=64, dtype=torch.bfloat16), padding(length))
    assert compiled() == before
