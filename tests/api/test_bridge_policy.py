"""The policy Bridge in a model: what it reads, what can depend on what, and what the proof says of it."""

from __future__ import annotations

import pytest
import torch

import tsa_compile as tsa
from tests.api.tiny import Layers, tiny_llama, token_ids
from tsa_compile.kernels.edges import Edges
from tsa_compile.passes.check_reach import depth_needed
from tsa_compile.policies.base import from_dict

FIXED, BRIDGE = tsa.Bridge(16, 0, 0), tsa.Bridge(16, 4, 4)


@torch.no_grad()
def hidden(model, ids):
    return model(ids)


def logits(model, ids, mask=None):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


@pytest.mark.parametrize("policy", [BRIDGE, tsa.Bridge.overlapping(16, 5, offset=8)], ids=str)
def test_a_model_with_it_is_the_model_with_its_mask(policy):
    model, ids = tiny_llama(), token_ids(75, 2)
    want = logits(model, ids, policy.guaranteed(None).mask(75).expand(2, 1, -1, -1))
    got = logits(tsa.transform(model, policy), ids)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert [s.policy for s in tsa.report(model).replaced] == ["Bridge"]


def test_what_reach_says_is_what_a_model_does():
    """A token that cannot be reached changes nothing, to the bit; one that can changes the output. And the report warns."""
    torch.manual_seed(3)
    for policy, warns in ((FIXED, True), (BRIDGE, False)):
        model, ids = Layers(), token_ids(96)
        found = tsa.reach(model, policy, 96)
        tsa.transform(model, policy)
        before = hidden(model, ids)
        for target in (32, 37, 63, 64, 90):
            for distance in range(1, 50, 3):
                source = target - distance
                if source < 0:
                    continue
                other = ids.clone()
                other[0, source] = (other[0, source] + 5) % 127 + 1
                same = torch.equal(hidden(model, other)[0, target], before[0, target])
                assert same != found.reach.connects(distance, target), (policy, source, target)
        assert any("at a position 16 n + 0 is sure" in w for w in tsa.report(model).warnings) == warns


def test_a_padded_batch_gives_what_its_rows_give_alone():
    model, ids = tsa.transform(tiny_llama(), BRIDGE), token_ids(60, 2)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        both = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(both[1, 13:], logits(model, ids[1:, 13:])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_chunks_over_a_cache_give_what_the_whole_gives_and_few_rows_are_dense():
    model, ids = tsa.transform(tiny_llama(max_position_embeddings=1024), BRIDGE), token_ids(480)
    want = logits(model, ids)
    parts, cache = [], None
    with torch.no_grad():
        for a, b in ((0, 150), (150, 300), (300, 480)):  # the last by a graph for any number of rows
            out = model(input_ids=ids[:, a:b], past_key_values=cache, use_cache=True)
            parts.append(out.logits)
            cache = out.past_key_values
        few = model(input_ids=token_ids(100), past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-4, atol=1e-5)
    assert few.isfinite().all()
    assert any("dense for up to 128 queries over a cache" in s.reason for s in tsa.report(model).replaced)


@pytest.mark.parametrize(
    ("policies", "length", "depth"),
    [
        ([FIXED], 64, None),
        ([BRIDGE], 33, 5),  # two blocks back: 2 m + 1 attentions
        ([tsa.Bridge(16, 0, 4)], 64, None),
        ([tsa.Bridge.source_extended(16, 1)], 33, 3),
        ([tsa.Bridge.overlapping(16, 4)], 33, 3),  # a block a layer, as the first row's 4 tokens end at one of the last rows
        ([FIXED, tsa.Bridge(16, 0, 0, offset=8)], 33, 5),
    ],
)
def test_the_depth_that_is_needed(policies, length, depth):
    assert depth_needed([p.guaranteed(None) for p in policies], length) == depth


def test_staggered_blocks_by_a_plan():
    plan = tsa.Plan(FIXED, rules=[("layers.*[13579]", "prefill", tsa.Bridge(16, 0, 0, offset=8))])
    found = tsa.reach(Layers(), plan, 33)
    assert [layer.edges for layer in found.layers] == [Edges.blocks(16), Edges.blocks(16, 8)]
    assert found.needed == 5


def test_plans_carry_it():
    for policy in (BRIDGE, tsa.Bridge(512, 64, 64, offset=3)):
        assert from_dict(policy.to_dict()) == policy
    assert tsa.Bridge.source_extended(64, 8) == tsa.Bridge(64, 8, 64)
    assert tsa.Bridge.overlapping(64, 8) == tsa.Bridge(64, 64, 8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((0, 0, 0), r"Bridge\.block must be an int >= 1 and <= 65536, got 0"),
        ((8, 9, 0), r"Bridge\.w_t must be an int >= 0 and <= 8, got 9"),
        ((8, 2, -1), r"Bridge\.w_s must be an int >= 0"),
        ((8, 2, 2, 8), r"Bridge\.offset must be an int >= 0 and <= 7, got 8"),
    ],
)
def test_a_bad_value_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        tsa.Bridge(*fields)
