"""What stands between an operator's call and its function: the autograd keys, which run it themselves, and the checks."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.test_ops import qkv
from tsa_compile.kernels import ops, registry

OP = torch.ops.tsa.block_sparse_attention.default


def attend(q, k, v):
    return OP(q, k, v, None, 1, None, None, None, 0.2, [0.05], 16, 16, 4, 16)


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Own(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return torch.full((1,), 7.0)


@pytest.mark.parametrize("guard", [torch.enable_grad, torch.no_grad, torch.inference_mode], ids=lambda g: g.__name__)
def test_who_watches_calls_sees_them_after_calls_that_nobody_watched(guard):
    with guard():
        q, k, v = qkv()
        expected = [attend(q, k, v) for _ in range(2)][1]
        with Watch() as mode:
            watched = attend(q, k, v)
        assert mode.seen == [OP]
        assert torch.equal(watched, expected)
        assert attend(torch.Tensor._make_subclass(Own, q), k, v) == 7
        assert OP in [n.target for n in make_fx(attend)(q, k, v).graph.nodes]
        with FakeTensorMode() as fake:
            assert attend(*map(fake.from_tensor, (q, k, v))).shape == expected.shape
        assert torch.equal(attend(q, k, v), expected)


def test_vmap_and_functionalize():
    q, k, v = qkv()
    one = attend(q, k, v)
    several = torch.func.vmap(attend, in_dims=(0, None, None))(torch.stack([q, 2 * q]), k, v)
    assert torch.equal(several[0], one)
    assert torch.equal(torch.func.functionalize(attend)(q, k, v), one)


def test_a_gradient_is_refused_where_it_is_asked_for_alone():
    q, k, v = qkv()
    weight = torch.nn.Parameter(q)
    out = attend(weight, k, v)
    assert torch.equal(out, attend(q, k, v))
    with pytest.raises(NotImplementedError, match="tsa::block_sparse_attention is forward only"):
        out.sum().backward()
    with torch.no_grad():
        assert not attend(weight, k, v).requires_grad
    assert not attend(q, k, v).requires_grad


def test_a_check_is_asked_once_for_the_same_shapes_strides_dtypes_and_numbers(monkeypatch):
    checked = []
    ops.add(
        ops.Operator(
            "test_checked(Tensor x, int[] list, float by=2.0, *, str name='a') -> Tensor",
            check=lambda x, list, by=2.0, name="a": checked.append((tuple(x.shape), x.stride(), list, by, name)),
            fake=lambda x, list, by=2.0, name="a": torch.empty_like(x),
            reference="checks:check_engine",  # replaced below
            host="checks:check_engine",
        )
    )
    monkeypatch.setattr(registry, "resolve", lambda where: lambda x, *_, **__: x.clone())
    call, x = torch.ops.tsa.test_checked, torch.zeros(4, 4)
    different = [
        lambda: call(x, [1, 2]), lambda: call(x[:2], [1, 2]), lambda: call(x.t(), [1, 2]), lambda: call(x.half(), [1, 2]),
        lambda: call(x, [1]), lambda: call(x, [1, 2], 3.0), lambda: call(x, [1, 2], name="b"),
    ]  # fmt: skip
    for n, one in enumerate(different, 1):
        one(), one()
        assert len(checked) == n
    monkeypatch.setattr(registry, "REMEMBERED", 3)
    call(x[:1], [1, 2])  # the memory is full, and begins anew
    different[0]()
    assert len(checked) == len(different) + 2


def test_a_check_that_raises_raises_again():
    q, k, v = qkv()
    for _ in range(2):
        with pytest.raises(ValueError, match="q must be"):
            attend(q[0], k, v)
