"""What must never happen silently: a mask lost, dropout or a gradient dropped, a dtype mixed up, a foreign tensor rewritten."""

from __future__ import annotations

import socket
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tsa_compile as tsa
from tests.api.tiny import KEEP_ALL, SPARSE, tiny_llama, token_ids
from tsa_compile.backend import Backend
from tsa_compile.plan import Plan

L = 24


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def through(function, *args, grad=False, policy=KEEP_ALL):
    """(result, report) of the function compiled with our backend."""
    torch._dynamo.reset()
    backend = Backend(Plan(policy), "eager")
    with torch.set_grad_enabled(grad):
        return torch.compile(function, backend=backend)(*args), backend.report


def qkv(dtype=torch.float32):
    return tuple(torch.randn(2, 4, L, 16, dtype=dtype) for _ in range(3))


def causal():
    return torch.ones(L, L, dtype=torch.bool).tril()


def padding():
    mask = torch.ones(2, L, dtype=torch.bool)
    mask[1, :5] = False
    return mask


def additive(allowed, dtype):
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def sdpa_masked(q, k, v, pad):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal() & pad[:, None, None])


def written_out(q, k, v, pad):
    """A float32 mask on whatever the operands are, as models with an eager attention add it."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores = scores + additive(causal() & pad[:, None, None], torch.float32)
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


# ---- masks


@pytest.mark.parametrize("attention", [sdpa_masked, written_out])
def test_a_replaced_site_got_the_padding(attention):
    """With the padding's keys and values poisoned, a lost mask would show."""
    q, k, v = qkv()
    pad = padding()
    expected = attention(q, k, v, pad)
    k, v = (x.masked_fill(~pad[:, None, :, None], 1e4) for x in (k, v))
    actual, report = through(attention, q, k, v, pad)
    assert len(report.replaced) == 1
    rows = pad[:, None].expand(-1, 4, -1)
    torch.testing.assert_close(actual[rows], expected[rows], atol=1e-5, rtol=1e-5)


def test_two_sites_keep_a_mask_each():
    def two(q, k, v, one, other):
        return sdpa_masked(q, k, v, one) - sdpa_masked(q, k, v, other)

    one = padding()
    args = (*qkv(), one, one.flip(0))
    actual, report = through(two, *args)
    assert len(report.replaced) == 2
    rows = (one & one.flip(0))[:, None].expand(-1, 4, -1)
    torch.testing.assert_close(actual[rows], two(*args)[rows], atol=1e-5, rtol=1e-5)


def test_a_mask_changed_between_calls_is_followed():
    compiled = torch.compile(sdpa_masked, backend=Backend(Plan(KEEP_ALL), "eager"))
    q, k, v = qkv()
    for pad in (padding(), padding().flip(0), torch.ones(2, L, dtype=torch.bool)):
        with torch.no_grad():
            actual = compiled(q, k, v, pad)
        rows = pad[:, None].expand(-1, 4, -1)
        torch.testing.assert_close(actual[rows], sdpa_masked(q, k, v, pad)[rows], atol=1e-5, rtol=1e-5)


# ---- dtypes


def test_a_float32_mask_on_bfloat16_operands():
    """The sum is float32: exact where it is followed, and the result is bfloat16."""
    args = (*qkv(torch.bfloat16), padding())
    actual, report = through(written_out, *args)
    assert actual.dtype == torch.bfloat16
    assert len(report.replaced) == 1 or report.sites[0].reason
    exact = written_out(*(x.double() for x in args[:3]), args[3])
    rows = args[3][:, None].expand(-1, 4, -1)
    torch.testing.assert_close(actual[rows].double(), exact[rows], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "written out"])
def test_autocast(attention, mask_dtype):
    """Projections cast to bfloat16 inside autocast; masks of any dtype; the output dtype is autocast's."""
    q, k, v = qkv()
    weight = torch.randn(16, 16) / 4

    def function(q, k, v, pad):
        allowed = causal() & pad[:, None, None]
        mask = allowed if mask_dtype == torch.bool else additive(allowed, mask_dtype)
        with torch.autocast("cpu", torch.bfloat16):
            q, k, v = (F.linear(x, weight) for x in (q, k, v))
            if attention == "sdpa":
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            scores = q @ k.mT * 0.25
            scores = scores.masked_fill(~allowed, float("-inf")) if mask_dtype == torch.bool else scores + mask
            return scores.softmax(-1) @ v

    pad = padding()
    with torch.no_grad():
        expected = function(q, k, v, pad)
    actual, report = through(function, q, k, v, pad)
    assert actual.dtype == expected.dtype
    assert len(report.sites) == 1
    assert report.sites[0].replaced or report.sites[0].reason
    rows = pad[:, None].expand(-1, 4, -1)
    torch.testing.assert_close(actual[rows], expected[rows], atol=3e-2, rtol=3e-2)


def test_autocast_around_the_call():
    """As users run float32 models: queries and keys leave the rotary embedding in float32, values are bfloat16."""
    model = tiny_llama()
    tsa.transform(model, KEEP_ALL)
    ids = token_ids(40)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            inside = model(input_ids=ids).logits
        outside = model(input_ids=ids).logits
        assert [s.replaced for s in tsa.report(model).sites] == [True] * 2
        tsa.restore(model)
        torch.testing.assert_close(outside, model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(inside, model(input_ids=ids).logits, atol=3e-2, rtol=3e-2)


def test_mixed_operands_outside_autocast_are_left_to_the_models_error():
    q, k, v = qkv()
    with pytest.raises(Exception, match=r"dtype"):
        through(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), q, k.bfloat16(), v)


# ---- training


def test_dropout_in_training_is_left_alone():
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5, is_causal=True)

    args = qkv()
    torch.manual_seed(0)
    actual, report = through(attend, *args)
    assert "dropout" in report.sites[0].reason
    torch.manual_seed(0)
    assert torch.equal(actual, attend(*args))


def test_a_model_in_training_mode():
    """Without gradients but with dropout it stays dense and drops; with dropout 0 it is replaced as in eval mode."""
    model, ids = tiny_llama(attention_dropout=0.5), token_ids(40)
    model.train()
    tsa.transform(model, SPARSE)
    with torch.no_grad():
        one, other = model(input_ids=ids).logits, model(input_ids=ids).logits
    assert not torch.equal(one, other)
    assert all("dropout" in s.reason for s in tsa.report(model).sites)
    torch._dynamo.reset()
    model = tiny_llama().train()
    tsa.transform(model, SPARSE)
    with torch.no_grad():
        model(input_ids=ids)
    assert len(tsa.report(model).replaced) == 1


def test_inputs_that_require_gradients_stay_dense_and_get_them():
    q, k, v = (x.requires_grad_() for x in qkv())
    actual, report = through(sdpa_masked, q, k, v, padding(), grad=True)
    assert "gradients" in report.sites[0].reason
    grads = torch.autograd.grad(actual.sum(), (q, k, v))
    expected = torch.autograd.grad(sdpa_masked(q, k, v, padding()).sum(), (q, k, v))
    torch.testing.assert_close(grads, expected)


def test_a_graph_traced_without_gradients_is_not_used_with_them():
    """The first call is replaced; a later call that wants gradients is traced anew, dense."""
    backend = Backend(Plan(KEEP_ALL), "eager")
    compiled = torch.compile(sdpa_masked, backend=backend)
    args = qkv()
    with torch.no_grad():
        compiled(*args, padding())
    q, k, v = (x.clone().requires_grad_() for x in args)
    compiled(q, k, v, padding()).sum().backward()
    assert [s.replaced for s in backend.report.sites] == [True, False]
    assert q.grad is not None


# ---- foreign tensors


class Tagged(torch.Tensor):
    """A subclass without behaviour of its own: Dynamo traces through it."""


def test_a_plain_subclass_gets_the_right_result_and_its_type():
    q, k, v = qkv()
    attend = partial(F.scaled_dot_product_attention, is_causal=True)
    actual, _ = through(attend, q.as_subclass(Tagged), k, v)
    assert type(actual) is Tagged
    torch.testing.assert_close(actual.as_subclass(torch.Tensor), attend(q, k, v), atol=1e-5, rtol=1e-5)


def test_a_wrapper_subclass_is_left_alone():
    from torch.testing._internal.two_tensor import TwoTensor

    q, k, v = (TwoTensor(x, x + 1) for x in qkv())
    attend = partial(F.scaled_dot_product_attention, is_causal=True)
    actual, report = through(attend, q, k, v)
    assert "TwoTensor: tensor subclasses are left alone" in report.sites[0].reason
    assert isinstance(actual, TwoTensor)
    torch.testing.assert_close(actual.b, attend(q.b, k.b, v.b))


@pytest.fixture
def mesh():
    dist = pytest.importorskip("torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_dtensor_is_left_alone(mesh):
    """Written out, since PyTorch has no sharding rule for SDPA on CPU."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def attend(q, k, v, hidden):
        return (q @ k.transpose(2, 3) * 0.25).masked_fill(hidden, float("-inf")).softmax(-1) @ v

    plain, hidden = qkv(), ~causal()[None, None]
    sharded = [distribute_tensor(x, mesh, [Shard(0)]) for x in plain]  # torch 2.11 multiplies no others
    actual, report = through(attend, *sharded, distribute_tensor(hidden, mesh, [Replicate()]))
    assert ["DTensor: tensor subclasses are left alone" in s.reason for s in report.sites] == [True]
    torch.testing.assert_close(actual.to_local(), attend(*plain, hidden))


# ---- compiled twice


def test_compiling_a_transformed_model_is_a_clear_error():
    model = tsa.transform(tiny_llama(), SPARSE)
    with pytest.raises(RuntimeError, match="transformed by tsa_compile"), torch.no_grad():
        torch.compile(model, backend="eager")(input_ids=token_ids(40))
    with torch.no_grad():
        model(input_ids=token_ids(40))  # the model itself still works
    assert len(tsa.report(model).replaced) == 1


def test_a_model_compiled_by_others_is_refused():
    model = nn.Linear(2, 2)
    model.compile(backend="eager")
    with pytest.raises(RuntimeError, match="compiled already"):
        tsa.transform(model)
