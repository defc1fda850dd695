"""Rollouts: their tokens' probabilities under both policies, ragged ends, refilled rows, and weights that change between them."""

from __future__ import annotations

import contextlib

import pytest
import torch

import tsa_compile as tsa
from tests.api.tiny import tiny_llama
from tests.cache.models import cache_name, tiny
from tsa_compile.generate.rollout import Rollouts
from tsa_compile.generate.rollout_slots import draw
from tsa_compile.generate.scoring import common_mass
from tsa_compile.learn.acceptance import acceptance
from tsa_compile.learn.gate import schedule_plan
from tsa_compile.steps import FIXED, REPLAYED

NEW = 20
ENDS = tuple(range(5, 11))
SPARSE = schedule_plan((0,), dense_layers=1)  # 3 of about 7 pages
EXACT = tsa.Plan(prefill=tsa.Dense(), decode=tsa.Exact())


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_llama(num_hidden_layers=2, initializer_range=0.12)


@pytest.fixture(scope="module")
def prompts():
    return [torch.randint(11, 128, (n,), generator=seeded(1)) for n in (96, 90, 85)]


@pytest.fixture(scope="module")
def rollouts(model):
    torch._dynamo.reset()
    return Rollouts(model, SPARSE, batch=3, ends=ENDS, look_every=4, rows_at_once=2, top=128)


@pytest.fixture(scope="module")
def drawn(rollouts, prompts):
    rollouts.plan = SPARSE
    return rollouts([prompts[0]], 7, new_tokens=NEW, generator=seeded(2))


def scored(model, prompt, sample):
    """Logits `[n, V]` of the sample's tokens, by one plain call."""
    ids = torch.cat([prompt, sample])[None]
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]


def scored_by_steps(model, prompt, sample):
    """Logits of all tokens but the first, by the dense model at once, and by steps of the transformed one over its own cache."""
    given = {cache_name(model): tsa.Cache(model, 1, 256)}
    with torch.no_grad():
        model(input_ids=prompt[None], **given)
        steps = [model(input_ids=token.view(1, 1), **given).logits[0] for token in sample[:-1]]
        return scored(model, prompt, sample)[1:], torch.cat(steps) if steps else torch.zeros(0, 128)


def test_exact_decode_has_the_probabilities_of_the_model(model, prompts, rollouts):
    rollouts.plan = EXACT
    found = rollouts(prompts, 4, new_tokens=NEW, generator=seeded(3))
    for n, (row, length) in enumerate(zip(found.tokens, found.lengths.tolist(), strict=True)):
        logits, sample = scored(model, prompts[n // 4], row[:length]), row[:length]
        want = logits.log_softmax(-1).gather(1, sample[:, None])[:, 0]
        for policy in (found.sparse, found.dense):
            torch.testing.assert_close(policy[n, :length], want, atol=2e-5, rtol=0)
            assert not policy[n, length:].any()
        inner = set(sample[:-1].tolist())
        assert not inner & set(ENDS)
        assert length == NEW or sample[-1].item() in ENDS
        assert not row[length:].any()
    assert found.lengths.min() < found.lengths.max() == NEW
    assert found.starts.tolist() == [96] * 4 + [90] * 4 + [85] * 4
    torch.testing.assert_close(found.accepted, found.mask.float(), atol=1e-5, rtol=0)
    assert found.steps < 4 * NEW  # 12 samples on 3 rows, which do not wait for the longest
    assert 0.5 < found.busy <= 1
    one = rollouts(prompts[:1], 2, new_tokens=1)  # a prefill, and no step
    assert one.tokens.shape == (2, 1)
    assert one.steps == 0


@pytest.mark.slow
def test_sparse_probabilities_are_those_of_steps_one_by_one(model, prompts, drawn):
    """Of the first and of refilled rows: a cache of one row, read token by token, says the same of the same tokens."""
    tsa.transform(model, SPARSE)
    try:
        for n in (0, 3, 5, 6):
            length = int(drawn.lengths[n])
            dense, sparse = scored_by_steps(model, prompts[0], drawn.tokens[n, :length])
            mine = slice(1, length)  # the first token comes from the dense prefill
            want = sparse.log_softmax(-1).gather(1, drawn.tokens[n, mine, None])[:, 0]
            torch.testing.assert_close(drawn.sparse[n, mine], want, atol=2e-5, rtol=0)
            torch.testing.assert_close(drawn.accepted[n, mine], acceptance(dense, sparse), atol=2e-5, rtol=0)
    finally:
        tsa.restore(model)
    assert drawn.accepted[drawn.mask].min() < 0.97
    assert (drawn.sparse - drawn.dense).abs().max() > 0.02


def test_tokens_are_drawn_from_the_distribution_that_is_named():
    """Temperature 0.5: frequencies within four standard errors."""
    logits = torch.randn(32)
    found = draw(logits.expand(4000, -1), 0.5, 3, seeded(4))
    p = (logits / 0.5).softmax(-1)
    counts = torch.bincount(found.tokens, minlength=32)
    assert ((counts - 4000 * p).abs() <= 4 * (4000 * p * (1 - p)).sqrt() + 1).all()
    torch.testing.assert_close(found.logps.exp(), p[found.tokens])
    torch.testing.assert_close(found.top[0].exp(), p.topk(3).values)
    assert torch.equal(found.names[0], p.topk(3).indices)


def test_new_weights_are_seen_and_nothing_is_compiled_for_them(model, prompts, drawn, rollouts):
    """Steps in place, and one whose weights lie elsewhere."""
    rollouts.plan = SPARSE
    before = len(rollouts.session.backend.graphs)
    state = {name: p.clone() for name, p in model.state_dict().items()}
    try:
        for seed in range(3):
            with torch.no_grad():
                for p in model.parameters():
                    step = 0.02 * torch.randn(p.shape, generator=seeded(seed))
                    if seed == 2:
                        p.data = p + step
                    else:
                        p.add_(step)
            found = rollouts([prompts[0]], 7, new_tokens=NEW, generator=seeded(2))
            want = scored(model, prompts[0], found.tokens[0, : int(found.lengths[0])]).log_softmax(-1)
            torch.testing.assert_close(found.sparse[0, 0], want[0, found.tokens[0, 0]], atol=2e-5, rtol=0)
            assert (found.sparse[0, 0] - drawn.sparse[0, 0]).abs() > 1e-3
    finally:
        model.load_state_dict(state)
    assert len(rollouts.session.backend.graphs) == before
    again = rollouts([prompts[0]], 7, new_tokens=NEW, generator=seeded(2))
    for a, b in zip(again[:6], drawn[:6], strict=True):
        assert torch.equal(a, b)


def test_the_cache_of_the_next_rollout_lies_where_that_of_the_last_one_lay(model, prompts, rollouts, drawn):
    """As recorded steps need it; also where a prefill has as many rows as the batch."""
    pool = rollouts.session.steps.pool
    assert len(pool) == 1
    storage = pool.lease(3, 1024)
    pool.give_back(storage)
    rollouts.plan, rollouts.rows_at_once = SPARSE, 3
    try:
        rollouts(prompts, 2, new_tokens=2)
        assert pool.lease(3, 1024) is storage
        pool.give_back(storage)
        rollouts.keep_cache = False
        rollouts(prompts, 2, new_tokens=2)
        assert len(pool) == 0
    finally:
        rollouts.keep_cache, rollouts.rows_at_once = True, 2


@pytest.mark.slow
def test_adapters_are_seen_and_nothing_is_compiled_for_their_updates(prompts):
    peft = pytest.importorskip("peft")
    torch._dynamo.reset()
    base = tiny_llama(num_hidden_layers=2, initializer_range=0.12)
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).eval()
    rollouts = Rollouts(wrapped, EXACT, batch=3, look_every=4)
    rollouts(prompts, 1, new_tokens=6, generator=seeded(2))
    before = len(rollouts.session.backend.graphs)
    seen = []
    for seed in range(2):
        with torch.no_grad():
            for name, p in wrapped.named_parameters():
                if "lora_B" in name:
                    p.copy_(torch.randn(p.shape, generator=seeded(seed)))
        found = rollouts(prompts, 1, new_tokens=6, generator=seeded(2))
        torch.testing.assert_close(found.sparse, found.dense, atol=2e-5, rtol=0)
        seen.append(found.dense[0, 0].item())
    assert abs(seen[0] - seen[1]) > 1e-3
    assert len(rollouts.session.backend.graphs) == before


@pytest.mark.slow
def test_training_mode_and_what_is_in_force_end_with_the_rollout(prompts):
    torch._dynamo.reset()
    model, seen = tiny_llama(attention_dropout=0.5), []
    model.train()
    model.model.norm.eval()

    @contextlib.contextmanager
    def decoding():
        seen.append(("in", model.training))
        yield
        seen.append(("out", model.training))

    found = Rollouts(model, EXACT, decoding=decoding)(prompts[:1], 2, new_tokens=4)
    torch.testing.assert_close(found.sparse, found.dense, atol=2e-5, rtol=0)  # no dropout
    assert seen == [("in", False), ("out", False)]
    assert model.training
    assert not model.model.norm.training
    assert model._compiled_call_impl is None


def test_no_number_of_prompts_is_traced_after_the_first_rollout(prompts):
    torch._dynamo.reset()
    rollouts = Rollouts(tiny_llama(initializer_range=0.12), EXACT, batch=3, ends=ENDS, look_every=2)
    rollouts(prompts[:1], 3, new_tokens=4)
    graphs = len(rollouts.session.backend.graphs)
    rollouts(prompts, 1, new_tokens=4)  # three prompts are read together
    rollouts(prompts[:2], 2, new_tokens=4)
    assert len(rollouts.session.backend.graphs) == graphs


def test_the_common_mass_of_some_tokens_is_no_less_than_of_all():
    p, q = (torch.randn(50, 30).mul(2).log_softmax(-1) for _ in range(2))
    want = acceptance(p, q)
    torch.testing.assert_close(common_mass(p, q), want)
    top, names = q.topk(5)
    some = common_mass(p.gather(1, names), top)
    assert (some >= want - 1e-6).all()
    assert (some - want <= 1 - top.exp().sum(-1) + 1e-6).all()
    torch.testing.assert_close(common_mass(top, top), torch.ones(50))


def test_what_is_wrong_is_named(model, prompts):
    for options, message in (
        ({"batch": 0}, "batch must be an int of at least 1, got 0"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"plan": tsa.Plan(prefill=tsa.Dense())}, "the plan must name a policy for decode"),
    ):
        with pytest.raises(ValueError, match=message):
            Rollouts(model, **{"plan": EXACT, **options})
    rollouts = Rollouts(model, EXACT)
    for given, options, message in (
        ([], {"new_tokens": 1}, "prompts must be one or more"),
        ([prompts[0][:0]], {"new_tokens": 1}, "prompts must be one or more"),
        (prompts, {"new_tokens": 0}, "new_tokens must be an int of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            rollouts(given, **options)
    sliding = Rollouts(tiny("mistral", layers=1), EXACT)
    with pytest.raises(ValueError, match="rows of a rollout end and begin apart"):
        sliding(prompts, new_tokens=1)
    tsa.transform(model, EXACT)
    try:
        with pytest.raises(ValueError, match="the model is transformed or compiled"):
            Rollouts(model, EXACT)
    finally:
        tsa.restore(model)


@pytest.mark.slow
def test_a_policy_that_takes_no_site_is_an_error(model, prompts):
    every_layer_dense = schedule_plan((0,), dense_layers=2)
    refused = tsa.Plan(prefill=tsa.Dense(), decode=tsa.PageSparse(keep=(0.5, 0.5, 0.5)))
    with pytest.raises(ValueError, match="no attention of a decode step takes PageSparse"):
        Rollouts(model, refused)(prompts[:1], new_tokens=2)
    Rollouts(model, every_layer_dense)(prompts[:1], new_tokens=2)  # exact in both layers, as the plan says


@pytest.mark.gpu
@pytest.mark.parametrize("plan", [EXACT, SPARSE], ids=["exact", "pages"])
def test_steps_are_replayed_on_a_gpu_and_read_new_weights(plan, prompts):
    """From the second rollout on nothing is traced, and every step but the first ones of a cache is a replay."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = tiny_llama(num_hidden_layers=2, initializer_range=0.12).cuda()
    rollouts = Rollouts(model, plan, batch=3, ends=ENDS, look_every=4, rows_at_once=2)
    for seed in range(3):
        before = rollouts.session.steps.counts().get(FIXED, 0), len(rollouts.session.backend.graphs)
        found = rollouts(prompts, 4, new_tokens=NEW, generator=torch.Generator("cuda").manual_seed(seed))
        first = found.tokens[0, : int(found.lengths[0])]
        want = scored(model, prompts[0].cuda(), first).log_softmax(-1).gather(1, first[:, None])[:, 0]
        torch.testing.assert_close(found.dense[0, : len(first)], want, atol=1e-3, rtol=0)
        if plan is EXACT:
            torch.testing.assert_close(found.sparse, found.dense, atol=1e-3, rtol=0)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01 * torch.randn_like(p))
    counts = rollouts.session.steps.counts()
    assert counts[REPLAYED] > found.steps
    assert (counts[FIXED], len(rollouts.session.backend.graphs)) == before
