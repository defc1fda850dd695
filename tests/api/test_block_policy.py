"""The policy BlockSparse in a model, in plans, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import tsa_compile as tsa
from tests.api.tiny import tiny_llama, token_ids
from tsa_compile.kernels.kept import key_blocks
from tsa_compile.passes.site import AttentionSite, MaskFacts, Operands
from tsa_compile.plan import as_plan
from tsa_compile.policies.base import call, from_dict
from tsa_compile.policies.why_dense import why_dense
from tsa_compile.session import attached

SPARSE = tsa.BlockSparse(alpha=0.999, pool=32, window=1, sinks=0, last_dense=0)


@pytest.fixture(scope="module")
def model():
    """Traced once: `logits` switches its plan."""
    torch.manual_seed(0)
    return tsa.transform(tiny_llama(), SPARSE, fullgraph=True)


def logits(model, ids, mask=None, policy=None):
    """By the policy; None: by the dense model, which a copy is."""
    if policy is None:
        model = copy.deepcopy(model)
    else:
        attached(model).plan = as_plan(policy)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


@pytest.mark.parametrize("padded", [False, True])
def test_alpha_zero_is_the_dense_model(model, padded):
    ids = token_ids(330, batch=2)
    mask = torch.ones_like(ids)
    mask[1, : 150 if padded else 0] = 0
    want = logits(model, ids, mask)[mask.bool()]
    torch.testing.assert_close(logits(model, ids, mask, tsa.BlockSparse(alpha=0))[mask.bool()], want, rtol=1e-4, atol=1e-5)
    sparse = logits(model, ids, mask, SPARSE)[mask.bool()]
    assert sparse.isfinite().all()
    assert not torch.allclose(sparse, want, atol=1e-5)


@pytest.mark.parametrize(("dim", "finest"), [(64, 1), (128, 2), (256, 8)])
def test_a_pool_too_fine_for_a_gpu_is_refused_with_the_reason(dim, finest):
    q = torch.empty(1, 2, 300, dim, device="meta", dtype=torch.bfloat16)
    site = AttentionSite.of(Operands(q, q, q), MaskFacts(True))
    site = dataclasses.replace(site, device=torch.device("cuda"))
    for policy in (tsa.BlockSparse(0.1, pool=finest), tsa.TokenSparse(inner=tsa.BlockSparse(0.1, pool=finest))):
        assert policy.refuse(site) is None
    if finest > 1:
        too_fine = tsa.BlockSparse(0.1, pool=finest // 2)
        wanted = f"pool {finest // 2}; from {finest} on with head dim {dim} on a GPU"
        assert too_fine.refuse(site) == tsa.TokenSparse(inner=too_fine).refuse(site) == wanted


@pytest.mark.parametrize(("policy", "low"), [(tsa.BlockSparse(alpha=0), 1.0), (SPARSE, 7 / 11)])
def test_the_report_has_the_share_of_the_key_blocks_that_are_read(policy, low):
    """Of those that begin before a row block's end; at least the own ones and the heaviest of the others."""
    measured = tsa.compare(tiny_llama(), input_ids=token_ids(300, batch=2), use_cache=False, policy=policy, repeats=1)
    assert all(low - 1e-6 <= site.kept <= 1 for site in measured.report.sites)


def test_the_share_of_a_bitmap():
    bits = torch.tensor([[0b11, 0b1011, 1 << 4], [0b11, 0b1111, 0b11111]])[None, :, :, None]  # row blocks 1 to 3 of 300 keys
    kept, of = key_blocks(bits.expand(2, -1, -1, -1), (torch.empty(2, 2, 300, 8), torch.empty(2, 2, 300, 8)), {})
    assert (kept.tolist(), of) == ([6 + 11] * 2, 2 * (2 + 4 + 5))
    later = key_blocks(bits[:, :, 1:], (torch.empty(1, 2, 100, 8), torch.empty(1, 2, 300, 8)), {"k_len": 290})
    assert (later[0].tolist(), later[1]) == ([4 + 9], 2 * (4 + 5))
    top = torch.tensor([[[[-1, 1]]]])  # 65 key blocks, the 64th bit is the sign
    assert key_blocks(top, (torch.empty(1, 1, 1, 8), torch.empty(1, 1, 4160, 8)), {})[0].tolist() == [65]


def test_later_tokens_do_not_reach_back_beyond_their_row_block(model):
    """Rows before the block that holds the first changed token are equal; so is everything with `last_dense=0`."""
    ids = token_ids(400)
    changed = ids.clone()
    changed[:, 300:] = (changed[:, 300:] + 7) % 100
    one, two = (logits(model, x, torch.ones_like(x), SPARSE) for x in (ids, changed))
    assert torch.equal(one[:, :256], two[:, :256])
    assert not torch.equal(one[:, 300:], two[:, 300:])


def test_without_lookahead_no_row_depends_on_a_later_token(model):
    """Wherever the change begins, and wherever the prompt ends."""
    ids, policy = token_ids(400), dataclasses.replace(SPARSE, lookahead=False)
    run = lambda ids: logits(model, ids, torch.ones_like(ids), policy)  # noqa: E731
    whole = run(ids)
    assert not torch.allclose(whole[:, 256:], logits(model, ids)[:, 256:], atol=1e-4)
    for first in (1, 130, 256, 301, 399):
        changed = ids.clone()
        changed[:, first:] = (changed[:, first:] + 7) % 100
        assert torch.equal(run(changed)[:, :first], whole[:, :first])
    torch.testing.assert_close(run(ids[:, :301]), whole[:, :301], rtol=1e-5, atol=1e-5)


def test_plans_carry_it():
    for policy in (SPARSE, tsa.BlockSparse(alpha=[0.1, 0.2]), tsa.BlockSparse(share="group")):
        assert from_dict(policy.to_dict()) == policy
        assert tsa.Plan.from_dict(tsa.Plan(policy).to_dict()) == tsa.Plan(policy)


def site(heads=4, kv_heads=2, length=400):
    q, k, v = (torch.randn(1, h, length, 16) for h in (heads, kv_heads, kv_heads))
    return AttentionSite.of(Operands(q, k, v), MaskFacts(True), 0.25)


def test_alphas_by_head():
    at = site()
    assert "alpha has 3 numbers for 4 query heads" in why_dense(tsa.BlockSparse(alpha=(0.1, 0.2, 0.3)), at)
    assert why_dense(tsa.BlockSparse(alpha=(0.1, 0.2, 0.3, 0.4)), at) is None


def test_a_group_reads_what_any_of_its_heads_keeps():
    at = site()
    single = SPARSE.select(call, at, None).bits
    union = dataclasses.replace(SPARSE, share="group")
    assert torch.equal(union.select(call, at, None).bits, single[:, 0::2] | single[:, 1::2])
    assert union.attend(call, at, union.select(call, at, None)).shape == (1, 4, 400, 16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(alpha=1), r"BlockSparse\.alpha must be a number in \[0, 1\), or one for each query head, got 1"),
        (dict(alpha=()), r"BlockSparse\.alpha must be .* got \(\)"),
        (dict(alpha=(0.1, True)), r"BlockSparse\.alpha must be .*True"),
        (dict(pool=48), r"BlockSparse\.pool must divide 128, got 48"),
        (dict(pool=0), r"BlockSparse\.pool must be an int >= 1 and <= 128, got 0"),
        (dict(window=0), r"BlockSparse\.window must be an int >= 1, got 0"),
        (dict(lookahead=1), r"BlockSparse\.lookahead must be a bool, got 1"),
        (dict(lookahead=False), r"BlockSparse\.last_dense must be 0 without lookahead, got 128"),
        (dict(share="all"), r"BlockSparse\.share must be one of .* got 'all'"),
    ],
)
def test_a_bad_value_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        tsa.BlockSparse(**fields)
