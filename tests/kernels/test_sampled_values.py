"""Attention that reads every key and some values: the operator against dense attention, Triton against the reference."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_decode import DEVICE, TOLERANCE, bf16_on_gpu, int32, poisoned, qkv
from tsa_compile.kernels import ops  # noqa: F401
from tsa_compile.kernels.attend.decode.reference import decode_attention_reference
from tsa_compile.kernels.attend.sampled.reference import sampled_value_attention_reference, value_weights

pytest.importorskip("triton")
from tsa_compile.kernels.attend.sampled import host
from tsa_compile.kernels.attend.sampled.host import sampled_value_attention

FORMS = ("prop", "flash")
slow = pytest.mark.slow
SEED = 0x1234_5678_9ABC_DEF0


@pytest.fixture(autouse=True)
def _poisoned():
    """Fresh memory holds NaN, or the largest integer: what no kernel wrote fails."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def seed(*values):
    return torch.tensor(values or (SEED,), device=DEVICE)


def both(x, *view, scale=0.5, seeds=None, samples=8, form="prop", key_mask=None, **masks):
    """(by Triton, by the reference in float64), each (out, lse)."""
    q, k, v = x
    given = (*view, key_mask, scale, seed() if seeds is None else seeds, samples, form)
    got = sampled_value_attention(q, k, v, *given, **masks)
    want = sampled_value_attention_reference(*map(exact, (q, k, v, *given)), **{n: exact(m) for n, m in masks.items()})
    return got, [x.to(DEVICE) for x in want]


def exact(x):
    """In float64 on the CPU, as no kernel computes in it; numbers and integers as they are."""
    if not isinstance(x, torch.Tensor):
        return x
    return x.cpu().double() if x.is_floating_point() else x.cpu()


def check(got, want, dtype=torch.float32):
    for a, b, tolerance in zip(got, want, (TOLERANCE[dtype], 1e-5 if dtype == torch.float32 else 2e-2), strict=True):
        same = torch.where(a.double() == b.double(), 0.0, a.double() - b.double())  # -inf in both
        assert same.norm() <= tolerance * b.double().nan_to_num(0, 0, 0).norm(), (same.norm(), b.norm())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("shape", "samples"),
    [
        (dict(capacity=300), 8),
        pytest.param(dict(capacity=300), 1, marks=slow),
        (dict(capacity=257, heads=3, kv_heads=1, dim=24, v_dim=40), 70),
        pytest.param(dict(capacity=100, heads=5, kv_heads=5, batch=1), 33, marks=slow),
        (dict(capacity=640, heads=20, kv_heads=1, batch=1), 16),
    ],
    ids=["plain", "one sample", "odd sizes", "no groups", "many heads"],
)
def test_triton_draws_what_the_reference_draws(shape, samples, form):
    x = qkv(**shape)
    capacity = shape["capacity"]
    lengths = int32(*(capacity - 13 * b for b in range(len(x[0]))))
    check(*both(x, None, 1, None, lengths, samples=samples, form=form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [0.1, pytest.param(4.0, marks=slow)], ids=["even", "a few heavy keys"])
def test_samples_of_several_programs_and_totals_in_several_reads(scale, form, monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(host, "TILES_AT_ONCE", 4)
    check(*both(qkv(capacity=700, batch=1), None, 1, int32(70), int32(601), scale=scale, samples=200, form=form))


@pytest.mark.parametrize("form", FORMS)
def test_what_no_key_lies_in_is_not_read(form):
    q, k, v = qkv(capacity=300)
    start, lengths = int32(70, 0), int32(150, 131)
    x = q, poisoned(k, start, lengths), poisoned(v, start, lengths)
    got, want = both(x, None, 1, start, lengths, form=form)
    assert not got[0].isnan().any()
    check(got, want)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("samples", [8, pytest.param(300, marks=slow)])
def test_masks_sinks_and_softcaps(samples, form):
    x = qkv(capacity=200)
    key_mask = torch.rand(2, 200, device=DEVICE) < 0.6
    numbers = torch.randn(1, 4, 1, 200, device=DEVICE)
    sinks = torch.randn(4, device=DEVICE)
    masks = dict(key_mask=key_mask, mask=numbers, sinks=sinks, softcap=3.0)
    check(*both(x, None, 1, None, int32(200, 111), samples=samples, form=form, **masks))
    hidden = torch.rand(2, 1, 1, 200, device=DEVICE) < 0.4
    check(*both(x, None, 1, None, None, samples=samples, form=form, mask=hidden))


@pytest.mark.parametrize("form", FORMS)
def test_blocks_and_strides(form):
    q, k, v = qkv(capacity=320, batch=1)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    table = torch.randperm(20)[:15][None].int().to(DEVICE)
    check(*both((q, k, v), table, 16, None, int32(229), form=form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, bf16_on_gpu])
def test_half_types(dtype, form):
    """Keys that score in whole numbers, so that no rounding moves a draw."""
    q, k, v = qkv(capacity=300, dtype=dtype)
    q, k = (torch.randint(-2, 3, x.shape, device=DEVICE).to(dtype) for x in (q, k))
    check(*both((q, k, v), None, 1, None, int32(300, 77), scale=0.125, samples=24, form=form), dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("triton_runs", [False, True], ids=["reference", "triton"])
def test_a_row_of_up_to_the_samples_is_exact(triton_runs, form):
    q, k, v = qkv(capacity=150)
    lengths, start = int32(64, 90), int32(30, 5)
    dtype = torch.float32 if triton_runs else torch.float64
    q, k, v = (x.to(dtype) for x in (q, k, v))
    operator = sampled_value_attention if triton_runs else sampled_value_attention_reference
    got = operator(q, k, v, None, 1, start, lengths, None, 0.5, seed(), 90, form)
    exact = decode_attention_reference(q.double(), k.double(), v.double(), None, 1, start, lengths, None, 0.5)[0]
    torch.testing.assert_close(got[0].double(), exact, rtol=1e-5, atol=1e-6 if triton_runs else 1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("samples", [pytest.param(8, marks=slow), 200])
def test_a_head_that_sees_no_key_and_logits_far_below_zero(samples, form):
    """Head 1 sees nothing, which the heads beside it do; the other batch row has a tile without keys before such logits."""
    x = qkv(capacity=200)
    mask = torch.randn(2, 4, 1, 200, device=DEVICE)
    mask[0, 1] = -torch.inf
    mask[1] -= 300.0
    mask[1, ..., :64] = -torch.inf
    got, want = both(x, None, 1, None, None, samples=samples, form=form, mask=mask)
    assert (got[0][0, 1] == 0).all()
    check(got, want)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_without_keys_is_zero(form):
    got, want = both(qkv(capacity=100), None, 1, None, int32(0, 100), form=form)
    assert (got[0][0] == 0).all()
    assert (got[1][0] == -torch.inf).all()
    check(got, want)
    hidden = torch.zeros(2, 100, dtype=torch.bool, device=DEVICE)
    assert (both(qkv(capacity=100), None, 1, None, None, form=form, key_mask=hidden)[0][0] == 0).all()


def test_a_row_of_the_batch_has_its_own_seed_and_an_empty_batch_works():
    q, k, v = (x[:1].expand(2, -1, -1, -1) for x in qkv(capacity=300))
    run = lambda seeds: torch.ops.tsa.sampled_value_attention(q, k, v, None, 1, None, None, None, 0.5, seeds, 8, "prop")[0]  # noqa: E731
    one, two = run(seed()), run(seed(SEED, SEED + 1))
    assert torch.equal(one[0], two[0])
    assert not torch.equal(one[1], two[1])
    assert not torch.equal(one[0], one[1])  # rows draw apart
    empty = (q[:0], k[:0], v[:0], None, 1, None, None, None, 0.5, seed(), 8, "prop")
    assert torch.ops.tsa.sampled_value_attention(*empty)[0].shape == q[:0].shape


@pytest.mark.parametrize("form", FORMS)
def test_a_value_that_no_head_of_the_group_draws_is_not_read(form):
    q, k, v = qkv(capacity=300, batch=1)
    logits = decode_attention_reference(q, k, v, None, 1, None, None, None, 0.5, scores=True)[2][:, :, 0]
    weights = value_weights(logits, *(torch.tensor([n], device=DEVICE) for n in (0, 300)), seed(), 8, form)
    drawn = (weights > 0).unflatten(1, (2, 2)).any(2)[..., None]
    assert 2 * drawn.sum() < drawn.numel()
    want = sampled_value_attention(q, k, v, None, 1, None, None, None, 0.5, seed(), 8, form)[0]
    v = torch.where(drawn, v, torch.nan)
    torch.testing.assert_close(sampled_value_attention(q, k, v, None, 1, None, None, None, 0.5, seed(), 8, form)[0], want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(samples=0), "samples must be 1 to 4096, got 0"),
        (dict(form="both"), r"form must be one of \('prop', 'flash'\), got 'both'"),
        (dict(seeds=torch.zeros(3, dtype=torch.long)), r"seed must be int64 \[1\] or \[2\]"),
        (dict(seeds=torch.zeros(1)), "seed must be int64"),
    ],
)
def test_a_bad_argument_is_named(change, message):
    call = dict(seeds=torch.zeros(1, dtype=torch.long), samples=8, form="prop") | change
    q, k, v = qkv(device="cpu")
    with pytest.raises(ValueError, match=message):
        torch.ops.tsa.sampled_value_attention(q, k, v, None, 1, None, None, None, 0.5, *call.values())
    with pytest.raises(ValueError, match="q must have 1 row, got 2"):
        torch.ops.tsa.sampled_value_attention(*qkv(2, device="cpu"), None, 1, None, None, None, 0.5, seed().cpu(), 8, "prop")


def test_the_fake_is_what_the_operator_gives():
    x = qkv(capacity=100, v_dim=24, device="cpu")
    given = (*x, None, 1, None, int32(100, 50, device="cpu"), None, 0.5, seed().cpu(), 8, "flash")
    torch.library.opcheck(torch.ops.tsa.sampled_value_attention.default, given, test_utils=("test_schema", "test_faketensor"))
