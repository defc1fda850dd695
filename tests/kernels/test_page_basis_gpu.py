"""Bases of pages and completion on a GPU: half types and head dims against the references, one graph for all lengths."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_page_basis import error
from tsa_compile.kernels import ops  # noqa: F401
from tsa_compile.kernels.attend.completion.reference import complete_pages_reference
from tsa_compile.kernels.common.page_basis import PageBasis
from tsa_compile.kernels.score.page_basis.reference import refine_scores_reference
from tsa_compile.kernels.state.append_basis.reference import page_basis_reference

pytestmark = pytest.mark.gpu
tsa = torch.ops.tsa
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def cache(length, batch=2, heads=8, kv_heads=2, dim=128, dtype=torch.bfloat16):
    """Keys near a few directions that change from page to page."""
    k = torch.randn(batch, kv_heads, length // 16, 16, 5, device="cuda")
    k = (k @ torch.randn(batch, kv_heads, length // 16, 5, dim, device="cuda")).flatten(2, 3) + 3
    k = k + 0.3 * torch.randn_like(k)
    q, v = torch.randn(batch, heads, 1, dim, device="cuda"), torch.randn_like(k)
    return [x.to(dtype) for x in (q, k, v)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_bases_are_as_near_as_the_reference(dtype, dim):
    _, k, _ = cache(2048, dim=dim, dtype=dtype)
    view = (None, 1, None, torch.tensor([2048, 1000], dtype=torch.int32, device="cuda"))
    got, want = tsa.page_basis(k, *view, None), page_basis_reference(k, *view, None)
    for b, pages in ((0, 128), (1, 62)):
        near = [error(PageBasis(*(x[b : b + 1] for x in basis)), k[b : b + 1], pages) for basis in (got, want)]
        assert near[0] < 0.15
        assert abs(near[0] / near[1] - 1) < 0.01


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "rows", "dim"), [(8, 1, 128), (14, 1, 64), (32, 1, 80), (6, 1, 96), (2, 1, 256), (6, 1, 26), (8, 5, 128)]
)
def test_scores_and_completion(dtype, heads, rows, dim):
    _, k, v = cache(4096, heads=heads, dim=dim, dtype=dtype)
    q = torch.randn(2, heads, rows, dim, device="cuda").to(dtype)
    view, scale = (None, 1, None, torch.tensor([4096, 1777], dtype=torch.int32, device="cuda")), dim**-0.5
    sums, counts = tsa.page_sums(k, *view, None)
    values, _ = tsa.page_sums(v, *view, None)
    logits, parts = tsa.page_scores(q, sums, counts, *view, 4096, scale)
    lists = tsa.select_pages(logits, parts, counts, *view, 4096, 2, [0.2], [0], 0.0, 0, 1)
    given = (q, logits, counts, *tsa.page_basis(k, *view, None))
    for which in ((None, None), lists):
        got = tsa.refine_scores(*given, *which, *view, 4096, scale)
        want = refine_scores_reference(*given, *which, *view, 4096, scale)
        for b, pages in ((0, 256), (1, 111)):
            torch.testing.assert_close(got[0][b, ..., :pages], want[0][b, ..., :pages], rtol=1e-3, atol=1e-3)
            chunks = -(-pages // 64)
            torch.testing.assert_close(got[1][b, ..., :chunks], want[1][b, ..., :chunks], rtol=1e-3, atol=1e-3)
    attended = tsa.page_attention(q, k, v, *lists, *view, None, scale)
    operands = (*attended, logits, values, counts, *lists, *view, 4096)
    got, want = tsa.complete_pages(*operands), complete_pages_reference(*operands)
    assert (got[0].float() - want[0].float()).norm() < 1e-2 * want[0].float().norm()
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-3)


def step(q, k, v, basis, value_sums, sums, counts, lengths):
    """What `PageSparse(0.1, "basis", completion=True)` does in a step."""
    view, capacity = (None, 1, None, lengths), k.shape[2]
    appended = (None, 1, None, lengths - 1, lengths, None, 1)
    tsa.append_pages(sums, counts, k, *appended)
    tsa.append_basis(*basis, k, *appended)
    tsa.append_pages(value_sums, counts, v, *appended)
    logits, parts = tsa.page_scores(q, sums, counts, *view, capacity, 0.1)
    first = tsa.select_pages(logits, parts, counts, *view, capacity, 2, [0.2], [0], 0.0, 0, 1)
    ranks = tsa.refine_scores(q, logits, counts, *basis, *first, *view, capacity, 0.1)
    lists = tsa.select_pages(*ranks, counts, *view, capacity, 2, [0.1], [0], 0.0, 1, 3)
    attended = tsa.page_attention(q, k, v, *lists, *view, None, 0.1)
    return tsa.complete_pages(*attended, logits, value_sums, counts, *lists, *view, capacity)[0]


def test_graph_replay_serves_all_lengths_and_nothing_waits():
    q, k, v = cache(4096)
    index = (tsa.page_basis(k, None, 1, None, None, None), tsa.page_sums(v, None, 1, None, None, None)[0])
    index = (*index, *tsa.page_sums(k, None, 1, None, None, None))
    lengths = torch.tensor([100, 7], dtype=torch.int32, device="cuda")
    step(q, k, v, *index, lengths)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            out = step(q, k, v, *index, lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for values in ((4096, 1), (3333, 160), (16, 17)):
        lengths.copy_(torch.tensor(values, dtype=torch.int32))
        want = step(q, k, v, *index, lengths)
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, want)
        assert not out.isnan().any()
    lengths.copy_(
        torch.tensor([32, 64], dtype=torch.int32)
    )  # pages 1 and 3 are full with the last row: their entries are made anew
    for x in index[0]:
        x.zero_()
    graph.replay()
    assert all((x[0, :, 1] != 0).any() and (x[1, :, 3] != 0).any() and not x[0, :, 0].any() for x in index[0][:2])


def test_graph_replay_of_a_cache_fills_a_page():
    """`tests/cache/test_page_bases.py` on a GPU: tokens are those of steps that make their state anew."""
    transformers = pytest.importorskip("transformers")
    import tsa_compile as api
    from tests.cache.models import tiny, token_ids
    from tests.cache.test_page_bases import Rebuilt
    from tsa_compile.steps import REPLAYED

    found = []
    for kind in (api.PageSparse, Rebuilt):
        plan = api.Plan(prefill=api.Dense(), decode=kind(0.3, "basis", completion=True, recent=1))
        model = api.transform(tiny("llama", layers=2).cuda(), plan)
        ids = token_ids(200, 3).cuda()
        mask = torch.ones_like(ids)
        mask[1, :13], mask[2, :50] = 0, 0
        torch.manual_seed(0)
        options = dict(attention_mask=mask, max_new_tokens=40, do_sample=True, pad_token_id=0)
        found.append(model.generate(ids, streamer=None, **options))
        if kind is api.PageSparse:
            assert api.report(model).steps[REPLAYED] > 30
    assert transformers.__version__
    assert torch.equal(*found)
