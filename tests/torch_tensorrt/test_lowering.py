"""The operators in core operators, as Torch-TensorRT gets them, against the references; plain PyTorch, no package of NVIDIA."""

import sys
import types
from collections import Counter

import pytest
import torch

import tsa_compile as tsa
from tests.export.test_aoti import Block, Encoder
from tsa_compile import export
from tsa_compile.export.torch_tensorrt_lowering import attend_blocks
from tsa_compile.export.torch_tensorrt_lowering.graph_passes import count_from_the_front, drop_empty_operands
from tsa_compile.export.torch_tensorrt_lowering.rank import dropped, largest
from tsa_compile.export.torch_tensorrt_lowering.table import LOWERINGS
from tsa_compile.kernels.common.coverage_reference import count_dropped
from tsa_compile.kernels.common.coverage_reference import largest as largest_reference
from tsa_compile.kernels.select.threshold_pages.reference import unpack_bits

OPS = torch.ops.tsa
SCALE, RULE = 0.25, (0.3, 16, 7, 32)  # coverage, window, pool, min_tokens
STRIPS = {"paper": (0, 0, 0), "completed": (24, 4, 20), "sinks alone": (0, 4, 0)}
DIM = torch.export.Dim.DYNAMIC


def operands(q_len, k_len, masked):
    """Batch 2, 4 query heads on 2 KV heads; holes in row 0, padding on the left and on the right in row 1."""
    q, k, v = 2 * torch.randn(2, 4, q_len, 16), 2 * torch.randn(2, 2, k_len, 16), torch.randn(2, 2, k_len, 24)
    mask = torch.ones(2, k_len, dtype=torch.bool)
    mask[0] = torch.rand(k_len) > 0.25
    mask[0, -1] = True
    mask[1, : k_len // 3] = mask[1, k_len - k_len // 7 :] = False
    return q, k, v, mask if masked else None


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(("q_len", "k_len"), [(40, 40), (130, 130), (300, 300), (60, 300), (5, 300)])
def test_each_operator_equals_its_reference(q_len, k_len, masked):
    torch.manual_seed(q_len)
    q, k, v, mask = operands(q_len, k_len, masked)
    view = OPS.key_view(mask) if masked else (None, None)
    if masked:
        assert all(map(torch.equal, LOWERINGS[OPS.key_view.default](mask), view))
    for window, sinks, heavy in STRIPS.values():
        for options in ({"share": "head"}, {"share": "group"}, {"min_queries": 16}):
            arguments = (q, k, *view, SCALE, *RULE, heavy)
            kept = OPS.select_tokens(*arguments, **options)
            assert all(map(torch.equal, LOWERINGS[OPS.select_tokens.default](*arguments, **options), kept))
            arguments = (q, k, v, *kept, *view, SCALE, window, sinks, 48, "reference")
            actual = LOWERINGS[OPS.sparse_attention.default](*arguments)[0]
            expected = OPS.sparse_attention(*arguments)[0]
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
            assert actual.stride() == expected.stride()
    arguments = (q, k, v, mask, SCALE, *RULE, 24, 4, 20, "reference")
    actual = LOWERINGS[OPS.token_sparse_attention.default](*arguments)
    torch.testing.assert_close(actual, OPS.token_sparse_attention(*arguments), atol=1e-4, rtol=0)
    arguments = (q, k, *view, SCALE, 0.3, 8, 16)
    kept = OPS.select_keys(*arguments)
    assert all(map(torch.equal, LOWERINGS[OPS.select_keys.default](*arguments), kept))
    arguments = (q, k, v, *kept, SCALE)
    actual = LOWERINGS[OPS.key_attention.default](*arguments)[0]
    torch.testing.assert_close(actual, OPS.key_attention(*arguments)[0], atol=1e-4, rtol=0)


BLOCK_RULES = [  # alpha, pool, window, sinks, last_dense, options
    ([0.3], 128, 1, 0, 0, {}),
    ([0.5], 32, 100, 4, 128, {}),
    ([0.0], 128, 1, 0, 0, {}),
    ([0.2, 0.4, 0.6, 0.8], 64, 1, 4, 0, {"share": "group"}),
    ([0.3], 128, 1, 4, 0, {"lookahead": False}),
    ([0.9], 128, 1, 0, 0, {"min_queries": 16}),
]


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(("q_len", "k_len"), [(40, 40), (450, 450), (200, 450), (5, 300)])
def test_block_selection_equals_its_reference(q_len, k_len, masked, monkeypatch):
    """Lists of 1 to 8 key blocks in three widths."""
    monkeypatch.setattr(attend_blocks, "WIDTHS", (2, 4))
    torch.manual_seed(q_len)
    q, k, v, mask = operands(q_len, k_len, masked)
    real = (*OPS.padding_range(mask), mask) if masked else (None, None, None)
    if masked:
        assert all(map(torch.equal, LOWERINGS[OPS.padding_range.default](mask), real))
    means, counts = OPS.key_block_means(k, *real)
    lowered = LOWERINGS[OPS.key_block_means.default](k, *real)
    torch.testing.assert_close(lowered[0][:, :, :-1], means, atol=1e-5, rtol=0)
    assert torch.equal(lowered[1][:, :-1].expand_as(counts), counts.long())
    for *rule, options in BLOCK_RULES:
        bits = OPS.select_key_blocks(q, k, means, counts, *real, SCALE, *rule, **options)
        read = LOWERINGS[OPS.select_key_blocks.default](q, k, *lowered, *real, SCALE, *rule, **options)
        assert torch.equal(read[:, :, :-1, :-1], unpack_bits(bits, counts.shape[1]))
        rest = (None, 1, *real, SCALE, False)
        actual = LOWERINGS[OPS.key_block_attention.default](q, k, v, read, *rest)[0]
        expected = OPS.key_block_attention(q, k, v, bits, *rest)[0]
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
        assert actual.stride() == expected.stride()
    arguments = (q, k, v, None, 1, *real, SCALE, *BLOCK_RULES[0][:-1])
    for below in (0, k_len + 1):
        actual = LOWERINGS[OPS.block_sparse_attention.default](*arguments, dense_below=below)
        expected = OPS.block_sparse_attention(*arguments, dense_below=below)
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_keys_in_a_pool_and_a_log_sum_exp_are_refused():
    q, k, v, _ = operands(40, 40, False)
    table, none = torch.zeros(2, 1, dtype=torch.int32), (None, None, None)
    with pytest.raises(export.ExportError, match="key_block_means: its keys lie in blocks of a pool"):
        LOWERINGS[OPS.key_block_means.default](k, *none, table, 64)
    lowered = LOWERINGS[OPS.key_block_means.default](k, *none)
    with pytest.raises(export.ExportError, match="select_key_blocks: its keys lie in blocks of a pool"):
        LOWERINGS[OPS.select_key_blocks.default](q, k, *lowered, *none, SCALE, [0.3], 128, 1, 0, 0, k_len=30)
    read = LOWERINGS[OPS.select_key_blocks.default](q, k, *lowered, *none, SCALE, [0.3], 128, 1, 0, 0)
    attend = LOWERINGS[OPS.key_block_attention.default]
    with pytest.raises(export.ExportError, match="key_block_attention: its keys lie in blocks of a pool"):
        attend(q, k, v, read, table, 64, *none, SCALE, False)
    with pytest.raises(export.ExportError, match="block_sparse_attention: its keys lie in blocks of a pool"):
        LOWERINGS[OPS.block_sparse_attention.default](q, k, v, table, 64, *none, SCALE, [0.3], 128, 1, 0, 0)
    with pytest.raises(export.ExportError, match="key_block_attention: its log-sum-exp is read"):
        attend(q, k, v, read, None, 1, *none, SCALE, True)


def test_nothing_is_dropped_at_coverage_zero():
    q, k, _, _ = operands(90, 90, False)
    arguments = (q, k, None, None, SCALE, 0.0, 16, 7, 32, 8)
    assert all(map(torch.equal, LOWERINGS[OPS.select_tokens.default](*arguments), OPS.select_tokens(*arguments)))


@pytest.mark.parametrize("coverage", [1e-9, 0.005, 0.3, 0.999])
def test_thresholds_without_a_sort(coverage):
    """Ties, zeros, the largest and the least of floats, and every n."""
    torch.manual_seed(0)
    scores = torch.rand(3, 200) ** 4
    scores[0, 20:80], scores[1, ::3], scores[2] = 0.25, 0.0, 2.0 ** -torch.arange(200.0)
    scores[0, 0] = 1.0
    scores = scores / scores.sum(1, keepdim=True)
    units, candidate = (scores * 2.0**52).long().sum(0)[None], torch.ones(1, 200, dtype=torch.bool)
    assert dropped(units, candidate, coverage).item() == count_dropped(scores, coverage)
    for n in (0, 1, 7, 60, 61, 150, 199, 200):
        member = largest(scores[None], torch.tensor([[[n]]]))[0]
        assert [m.nonzero().flatten().tolist() for m in member] == largest_reference(scores, n).tolist()


class Padded(torch.nn.Module):
    """One causal attention with grouped heads over padded rows, as a policy makes it."""

    def forward(self, q, k, v, mask):
        view = OPS.key_view(mask)
        kept = OPS.select_tokens(q, k, *view, SCALE, *RULE, 20)
        return OPS.sparse_attention(q, k, v, *kept, *view, SCALE, 24, 4, 48, "auto")[0]


class Masked(torch.nn.Module):
    """The same as a model has it."""

    def forward(self, q, k, v, mask):
        position = torch.arange(q.shape[2], device=q.device)
        seen = (position <= position[:, None]) & mask[:, None, None]
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=SCALE, enable_gqa=True)


@pytest.fixture(scope="module", params=["tokens", pytest.param("blocks", marks=pytest.mark.slow)])
def lowered(request):
    """The padded attention as Torch-TensorRT gets it, for any batch and length; with its program."""
    length = torch.export.Dim("length", min=2, max=2048)
    shapes = ({0: DIM, 2: length}, {0: DIM, 2: length}, {0: DIM, 2: length}, {0: DIM, 1: length})
    example = operands(100, 100, True)
    if request.param == "tokens":
        program = torch.export.export(Padded(), example, dynamic_shapes=shapes, strict=False)
    else:
        program = export.program(Masked(), example, policy=tsa.BlockSparse(0.3, window=100), dynamic_shapes=shapes)
    return program, program.run_decompositions(LOWERINGS)


def test_one_graph_for_all_lengths(lowered):
    program, graph = lowered
    for length in (7, 150, 333, 1100):
        x = operands(length, length, True)
        torch.testing.assert_close(graph.module()(*x), program.module()(*x), atol=1e-4, rtol=0)


def test_no_operator_of_ours_and_no_scores_of_length_by_length_are_left(lowered):
    _, graph = lowered
    assert {n.target.namespace for n in graph.graph.nodes if isinstance(n.target, torch._ops.OpOverload)} == {"aten"}
    (length,) = (n.meta["val"].shape[1] for n in graph.graph.nodes if n.name == "mask")
    shapes = [n.meta["val"].shape for n in graph.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    assert any(length in s for s in shapes)
    assert all(Counter(str(size) for size in s)[str(length)] < 2 for s in shapes)


def test_an_operator_without_a_lowering_is_named(monkeypatch, tmp_path):
    module = types.ModuleType("torch_tensorrt")
    module.__version__, module._tsa_lowered = "2.14.0", True
    module.ENABLED_FEATURES = types.SimpleNamespace(qdp_plugin=False)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", module)
    message = r"Torch-TensorRT has no form of tsa::token_block_attention; it takes BlockSparse, TokenSparse"
    policy = tsa.TokenSparse(inner=tsa.BlockSparse())
    with torch._dynamo.config.patch(capture_scalar_outputs=False), pytest.raises(export.ExportError, match=message):
        export.torch_tensorrt(Block(), (torch.randn(2, 100, 64),), tmp_path / "m.ep", policy=policy)


def test_a_missing_package_and_an_old_one_name_the_command(monkeypatch):
    command = r"pip install torch==2\.14\.1 torch-tensorrt-rtx==2\.14\.0"
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(ImportError, match=command):
        export.register_torch_tensorrt()
    old = types.ModuleType("torch_tensorrt")
    old.__version__ = "2.13.0"
    monkeypatch.setitem(sys.modules, "torch_tensorrt", old)
    with pytest.raises(ImportError, match=f"torch_tensorrt 2.13.0 is too old: {command}"):
        export.register_torch_tensorrt()


def test_a_cache_that_begins_empty_is_no_obstacle():
    """Torch-TensorRT takes no `cat` of operands of different rank: the empty one goes, others stay."""

    class Append(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("empty", torch.empty(0))

        def forward(self, x):
            return torch.cat([self.empty, x], -2), torch.cat([x, self.empty, x], 1), torch.cat([x, x], 0)

    x = torch.randn(2, 3, 4)
    module = torch.export.export(Append(), (x,)).module()
    expected = module(x)
    drop_empty_operands(module)
    assert [len(n.args[0]) for n in module.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)] == [2, 2]
    assert all(map(torch.equal, module(x), expected))


def test_slices_from_the_end_count_from_the_front():
    """Torch-TensorRT starts them wrongly where two dimensions are dynamic. Fixed sizes and other starts stay."""

    class Last(torch.nn.Module):
        def forward(self, x):
            return x[:, -2:], x[:, 1:], x[..., -3:]

    x = torch.randn(2, 9, 4)
    module = torch.export.export(Last(), (x,), dynamic_shapes=({0: DIM, 1: DIM},)).module()
    count_from_the_front(module)
    nodes = list(module.graph.find_nodes(op="call_function", target=torch.ops.aten.slice.Tensor))
    starts = {n.args[1]: n.args[2] for n in nodes if isinstance(n.args[2], torch.fx.Node)}
    assert list(starts) == [1]
    assert -3 in [n.args[2] for n in nodes]
    for y in (x, torch.randn(3, 5, 4)):
        assert all(map(torch.equal, module(y), Last()(y)))


def test_encoders_take_probes():
    model, example = Encoder().eval(), (torch.randn(2, 65, 64),)
    program = export.program(model, example, policy=tsa.ProbeSparse(coverage=0.3, probes=8, min_keys=16))
    graph = program.run_decompositions(LOWERINGS)
    x = 3 * torch.randn(2, 65, 64)
    with torch.no_grad():
        torch.testing.assert_close(graph.module()(x), program.module()(x), atol=1e-4, rtol=0)
    assert not [n for n in graph.graph.nodes if "tsa" in str(n.target)]
