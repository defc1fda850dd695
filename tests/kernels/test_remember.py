"""`tsa::remember_keys`, and `tsa::key_attention` over its lists, which have room for few keys."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.flat import key_attention_reference
from tsa_compile.kernels import compose, ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.compose_reference import remember_keys_reference
from tsa_compile.kernels.types import Operands

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
remember = torch.ops.tsa.remember_keys
# rows, prefix, count, queries, query and KV heads
CASES = {
    "plain": (8, 100, 10, 8, 4, 2),
    "some queries": (32, 90, 9, 5, 4, 1),
    "all but one": (8, 50, 49, 8, 2, 2),
    "all": (5, 40, 40, 5, 2, 1),
    "more than there are": (5, 40, 99, 5, 2, 1),
    "one": (4, 60, 1, 4, 6, 2),
    "none": (4, 60, 0, 4, 2, 1),
    "no prefix": (5, 0, 7, 5, 2, 1),
}


def tensors(rows, prefix, heads, kv_heads, dtype=torch.float32, device=DEVICE, dim=16, batch=2):
    q = 2 * torch.randn(batch, heads, rows, dim)
    k, v = (torch.randn(batch, kv_heads, prefix + rows, dim) for _ in range(2))
    return [x.to(device, dtype) for x in (q, k, v)]


@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_the_definition(name):
    rows, prefix, count, queries, heads, kv_heads = CASES[name]
    q, k, _ = tensors(rows, prefix, heads, kv_heads, torch.float64, "cpu")
    indices, counts = remember(q, k, 0.3, queries, count)
    probes = [(2 * p + 1) * rows // (2 * queries) for p in range(queries)]
    for b in range(2):
        for g in range(kv_heads):
            scores = [0.0] * prefix
            for h in range(g * heads // kv_heads, (g + 1) * heads // kv_heads):
                for p in probes:
                    weights = torch.softmax(0.3 * k[b, g] @ q[b, h, p], 0)  # prefix and block
                    scores = [s + w for s, w in zip(scores, weights.tolist(), strict=False)]
            best = sorted(range(prefix), key=lambda j: (-scores[j], j))[: min(count, prefix)]
            assert indices[b, g].tolist() == [*sorted(best), *range(prefix, prefix + rows)]
    assert counts.tolist() == [min(count, prefix) + rows] * 2


@pytest.mark.parametrize("name", CASES)
def test_triton_chooses_the_same(name):
    pytest.importorskip("triton")
    rows, prefix, count, queries, heads, kv_heads = CASES[name]
    q, k, _ = tensors(rows, prefix, heads, kv_heads)
    got = compose.remember_keys(Operands(q, k, None), 0.3, queries, count)
    want = remember_keys_reference(Operands(q.double(), k.double(), None), 0.3, queries, count)
    assert torch.equal(got.indices, want.indices)
    assert torch.equal(got.counts, want.counts)


@pytest.mark.filterwarnings("ignore:All-NaN")
def test_queries_that_are_not_finite_remember_the_first_tokens():
    pytest.importorskip("triton")
    q, k, _ = tensors(4, 50, 2, 1)
    x = Operands(torch.full_like(q, torch.nan), k, None)
    for keys in (compose.remember_keys(x, 0.3, 4, 5), remember_keys_reference(x, 0.3, 4, 5)):
        assert keys.indices[0, 0].tolist() == [0, 1, 2, 3, 4, 50, 51, 52, 53]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attention_over_short_lists(dtype):
    """Its scratch has room for the listed keys alone."""
    pytest.importorskip("triton")
    from tsa_compile.kernels.attend.keys.host import key_attention
    from tsa_compile.kernels.types import Keys

    q, k, v = tensors(8, 200, 4, 2, dtype)
    keys = Keys(*remember(q.cpu().float(), k.cpu().float(), 0.3, 8, 21))
    keys = Keys(*(x.to(DEVICE) for x in keys))
    got = key_attention(Operands(q, k, v), keys, 0.3, need_lse=True)
    exact = key_attention_reference(q.double(), k.double(), v.double(), *keys, 0.3)
    assert float((got.out.double() - exact).norm() / exact.norm()) < (1e-5 if dtype == torch.float32 else 1.5e-3)
    seen = (
        k.double()
        .repeat_interleave(2, 1)
        .gather(2, keys.indices.long().repeat_interleave(2, 1)[..., None].expand(-1, -1, -1, 16))
    )
    torch.testing.assert_close(got.lse.double(), (0.3 * q.double() @ seen.mT).logsumexp(-1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(device):
    q, k, v = tensors(8, 40, 4, 2, device=device)
    torch.library.opcheck(remember.default, (q, k, 0.3, 5, 7))
    torch.library.opcheck(torch.ops.tsa.key_attention.default, (q, k, v, *remember(q, k, 0.3, 5, 7), 0.3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(queries=0), "remember_keys: queries must be at least 1 and count at least 0, got 0 and 7"),
        (dict(count=-1), "got 5 and -1"),
        (dict(k=torch.randn(2, 2, 3, 16)), "a block of 8 rows is the last of the keys, of which there are 3"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    q, k, _ = tensors(8, 40, 4, 2, device="cpu")
    with pytest.raises(ValueError, match=message):
        remember(*(dict(q=q, k=k, scale=0.3, queries=5, count=7) | changes).values())


@pytest.mark.gpu
def test_no_synchronisation_and_graph_replay():
    q, k, v = tensors(32, 5000, 8, 2, torch.bfloat16, dim=128)

    def run():
        keys = remember(q, k, 0.09, 32, 512)
        return torch.ops.tsa.key_attention(q, k, v, *keys, 0.09)[0]

    want = run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    got.fill_(-7)
    graph.replay()
    assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large(dtype):
    """The lists hold as much mass as the exact ones, which rounding may swap at their end."""
    q, k, _ = tensors(32, 20_000, 8, 2, dtype, dim=128)
    got = remember(q, k, 0.09, 32, 512)
    weights = (0.09 * q.float().unflatten(1, (2, 4)) @ k.float()[:, :, None].mT).softmax(-1)[..., :20_000].mean((2, 3))
    held = weights.gather(2, got[0][..., :512].long()).sum(2)
    assert (held > 0.999 * weights.topk(512).values.sum(2)).all()
