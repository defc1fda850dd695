"""The registered operators: opcheck, dispatch, errors, no gradient."""

import contextlib
import inspect
import threading
import unittest.mock

import pytest
import torch

from tests.kernels.flat import order
from tsa_compile.kernels import ops, registry

SELECT = (0.3, 0.05, 8, 3, 16, 4)  # scale, coverage, window, pool, min_tokens, heavy
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def qkv(batch=2, heads=4, kv_heads=2, q_len=64, k_len=64, dim=16, v_dim=16, device="cpu", dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    make = lambda h, n, d: torch.randn(batch, n, h, d, generator=g).to(device, dtype).transpose(1, 2)  # noqa: E731
    return make(heads, q_len, dim), make(kv_heads, k_len, dim), make(kv_heads, k_len, v_dim)


def padding(batch, k_len, device="cpu"):
    return (torch.arange(k_len)[None] >= 5 * torch.arange(batch)[:, None]).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("q_len", [64, 24])
def test_opcheck(device, masked, q_len):
    q, k, v = qkv(q_len=q_len, v_dim=32, device=device)
    mask = padding(2, 64, device) if masked else None
    view = order(mask)
    select = (q, k, *view, *SELECT)
    torch.library.opcheck(torch.ops.tsa.select_tokens.default, select)
    torch.library.opcheck(torch.ops.tsa.select_tokens.default, select, {"share": "group"})
    selection = torch.ops.tsa.select_tokens(*select)
    torch.library.opcheck(torch.ops.tsa.sparse_attention.default, (q, k, v, *selection, *view, 0.3, 8, 2, 24, "auto"))
    one = (q, k, v, mask, *SELECT[:5], 8, 2, 4, "auto")
    torch.library.opcheck(torch.ops.tsa.token_sparse_attention.default, one)


@pytest.mark.parametrize("device", DEVICES)
def test_one_operator_is_the_two_composed(device):
    q, k, v = qkv(device=device)
    selection = torch.ops.tsa.select_tokens(q, k, None, None, *SELECT)
    two = torch.ops.tsa.sparse_attention(q, k, v, *selection, None, None, 0.3, 8, 2, 24, "auto")[0]
    one = torch.ops.tsa.token_sparse_attention(q, k, v, None, *SELECT[:5], 8, 2, 4, "auto")
    assert torch.equal(one, two)
    assert one.transpose(1, 2).is_contiguous()


def test_gradient_is_refused_with_the_operators_name():
    q, k, v = (x.requires_grad_() for x in qkv())
    out = torch.ops.tsa.token_sparse_attention(q, k, v, None, *SELECT[:5], 0, 0, 0, "auto")
    with pytest.raises(NotImplementedError, match="tsa::token_sparse_attention is forward only"):
        out.sum().backward()


def broken(**changes):
    names = ("q", "k", "v", "mask", "scale", "coverage", "window", "pool", "min_tokens", "sw", "ss", "heavy", "engine")
    values = dict(zip(names, (*qkv(), None, *SELECT[:5], 0, 0, 0, "auto"), strict=True))
    return tuple((values | changes).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.randn(2, 3, 64, 16)}, "3 query heads are no multiple of 2"),
        ({"q": torch.randn(2, 4, 65, 16)}, "65 queries for 64 keys"),
        ({"q": torch.randn(2, 4, 64, 8)}, "batch or head dim"),
        ({"q": torch.randn(4, 64, 16)}, "q must be"),
        ({"v": torch.randn(2, 2, 63, 16)}, "k .* and v .* differ"),
        ({"v": torch.randn(2, 2, 64, 16).half()}, "v is torch.float16"),
        ({"q": torch.ones(2, 4, 64, 16, dtype=torch.int32)}, "q must be float16"),
        ({"mask": torch.ones(2, 63, dtype=torch.bool)}, "key_mask must be bool"),
        ({"mask": torch.ones(2, 64)}, "key_mask must be bool"),
        ({"coverage": 1.0}, "coverage must be in"),
        ({"coverage": float("nan")}, "coverage must be in"),
        ({"pool": 4}, "pool must be odd"),
        ({"window": 0}, "window and min_tokens"),
        ({"heavy": 17}, "heavy must be from 0 to min_tokens"),
        ({"engine": "magic"}, "unknown engine 'magic'"),
    ],
)
def test_bad_arguments_name_the_argument(changes, message):
    with pytest.raises(ValueError, match=message):
        torch.ops.tsa.token_sparse_attention(*broken(**changes))


@pytest.mark.parametrize("engine", ["fused", "packed"])
def test_an_engine_that_cannot_run_raises(engine):
    with pytest.raises(RuntimeError, match=f"engine '{engine}' needs CUDA"):
        torch.ops.tsa.token_sparse_attention(*broken(engine=engine))


def test_dynamic_shapes_trace_to_one_graph():
    def f(q, k, v):
        return torch.ops.tsa.token_sparse_attention(q, k, v, None, *SELECT[:5], 0, 0, 0, "auto")

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=True)
    counter = torch._dynamo.utils.counters
    counter.clear()
    for length in (40, 64, 97):
        q, k, v = qkv(q_len=length, k_len=length)
        assert torch.equal(compiled(q, k, v), f(q, k, v))
    assert counter["stats"]["unique_graphs"] == 1


def test_source_tag_names_this_source():
    assert len(ops.source_tag()) == 16


@pytest.mark.parametrize("operator", ops.OPERATORS, ids=lambda o: o.name)
def test_every_row_names_functions_that_exist_and_take_its_arguments(operator):
    pytest.importorskip("triton")
    arguments = getattr(torch.ops.tsa, operator.name).default._schema.arguments
    for where in (operator.reference, operator.host):
        takes = inspect.signature(registry.resolve(where)).parameters.values()
        named = {a.name for a in arguments}
        own = [p for p in takes if p.kind is p.KEYWORD_ONLY and p.name not in named]  # tile sizes, for those who time them
        assert operator.arguments or [p.name for p in takes if p not in own] == [a.name for a in arguments], where
        assert all(p.default is not p.empty for p in own), where
    if operator.arguments:
        flat = [p.name for p in inspect.signature(operator.arguments).parameters.values() if p.kind is not p.VAR_POSITIONAL]
        assert flat == [a.name for a in arguments][: len(flat)]


def test_a_recorder_sees_its_own_thread_alone():
    seen, other = [], []
    call = lambda: torch.ops.tsa.select_tokens(*qkv()[:2], None, None, *SELECT)  # noqa: E731
    with ops.observing(lambda counts, k_len: seen.append(k_len)):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        assert not seen
        with ops.observing(lambda counts, k_len: other.append(k_len)):
            call()
    call()
    assert seen == other == [64]


def test_an_operator_is_one_row_and_may_write_its_argument():
    row = ops.Operator(
        "test_add_(Tensor(a!) x, Tensor y, float by=2.0) -> ()",
        check=lambda x, y, by=2.0: None,
        fake=lambda x, y, by=2.0: None,
        reference="checks:check_engine",  # replaced below
        host="checks:check_engine",
    )
    ops.add(row)
    write = lambda x, y, by=2.0: (x.data.add_(y * by), None)[1]  # noqa: E731
    with unittest.mock.patch.object(registry, "resolve", return_value=write):
        x = torch.zeros(3)
        torch.ops.tsa.test_add_(x, torch.ones(3))
        assert x.tolist() == [2, 2, 2]
        assert x._version == 1  # counted, though only its storage was written

        def f(x, y):
            torch.ops.tsa.test_add_(x, y, 3.0)
            return x * 2

        assert torch.compile(f, backend="aot_eager", fullgraph=True)(x, torch.ones(3)).tolist() == [10, 10, 10]
        with pytest.raises(NotImplementedError, match="tsa::test_add_ is forward only"):
            torch.ops.tsa.test_add_(torch.zeros(3), torch.ones(3, requires_grad=True))


@pytest.mark.parametrize("current", [0, 1])
def test_the_device_of_the_operands_is_made_the_current_one(monkeypatch, current):
    entered = []
    guard = lambda device: (entered.append(device.index), contextlib.nullcontext())[1]  # noqa: E731
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", guard)
    q = unittest.mock.Mock(device=torch.device("cuda", 1))
    assert registry.on_its_device(lambda q, n: n)(q, 7) == 7
    assert entered == ([] if current == 1 else [1])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_a_gpu_that_is_not_the_current_one():
    q, k, v = qkv(device="cuda:1")
    args = (*SELECT[:5], 8, 2, 4, "auto")
    with torch.cuda.device(0):
        out = torch.ops.tsa.token_sparse_attention(q, k, v, None, *args)
        assert torch.cuda.current_device() == 0
    expected = torch.ops.tsa.token_sparse_attention(q.cpu(), k.cpu(), v.cpu(), None, *args)
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_graph_replay_on_a_gpu_that_is_not_the_current_one():
    q, k, v = qkv(device="cuda:1")
    args = (*SELECT[:5], 8, 2, 4, "auto")
    expected = torch.ops.tsa.token_sparse_attention(q, k, v, None, *args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(1)), torch.cuda.device(0):
        out = torch.ops.tsa.token_sparse_attention(q, k, v, None, *args)
    out.zero_()
    graph.replay()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
