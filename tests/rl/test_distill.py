"""DistillSparse: the adapter is in the sparse policy alone, which it brings to the dense one."""

from __future__ import annotations

import pytest
import torch

from tests.api.tiny import tiny_llama
from tsa_compile.generate.rollout import Rollouts
from tsa_compile.generate.scoring import behind, left_padded
from tsa_compile.learn.gate import schedule_plan
from tsa_compile.learn.sparse_rows import sparse_logits

NEW = 24
SPARSE = schedule_plan((1,), dense_layers=1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def prompts():
    return [torch.randint(2, 128, (n,), generator=seeded(1)) for n in (96, 77)]


@pytest.fixture
def parts(prompts):
    """(model without adapter's logits, model, adapter with random weights, rollouts, a rollout)."""
    pytest.importorskip("peft")
    from tsa_compile.rl.distill import SparseAdapter

    torch._dynamo.reset()
    torch.manual_seed(0)
    model = tiny_llama(num_hidden_layers=2, initializer_range=0.12)
    with torch.no_grad():
        before = model(input_ids=prompts[0][None]).logits
    adapter = SparseAdapter(model, rank=4, lr=3e-3, rows_at_once=4)
    with torch.no_grad():
        for p in adapter.parameters:
            p.add_(0.02 * torch.randn(p.shape))
    rollouts = Rollouts(model, SPARSE, batch=8, look_every=4, decoding=adapter.decoding)
    return before, model, adapter, rollouts, rollouts(prompts, 4, new_tokens=NEW, generator=seeded(2))


@pytest.mark.slow
def test_the_adapter_is_off_but_in_the_sparse_policy(parts, prompts):
    before, model, adapter, rollouts, found = parts
    with torch.no_grad():
        assert torch.equal(model(input_ids=prompts[0][None]).logits, before)  # the policy that is trained
        ids, mask = left_padded([p for p in prompts for _ in range(4)], found.tokens.device)
        given = behind(ids, mask, found.tokens, found.mask)
        kept = NEW + 1
        dense = model(**given, logits_to_keep=kept).logits[:, :-1].log_softmax(-1)
        with adapter.decoding():
            sparse = sparse_logits(model, given, ids.shape[1], rollouts.plan)[:, :-1].log_softmax(-1)
    token = found.tokens[..., None]
    torch.testing.assert_close(found.dense, dense.gather(2, token)[..., 0], atol=2e-5, rtol=0)
    torch.testing.assert_close(found.sparse, sparse.gather(2, token)[..., 0], atol=2e-5, rtol=0)  # the steps, at once
    assert (found.sparse - found.dense).abs().max() > 0.05
    loss = model(input_ids=prompts[0][None], labels=prompts[0][None]).loss
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in adapter.parameters)
    own = {id(p) for p in adapter.parameters}
    assert all(p.grad is not None for p in model.parameters() if id(p) not in own)
    model.zero_grad()
    with pytest.raises(ValueError, match="the model has adapters already"):
        type(adapter)(model)
    adapter.remove()
    assert set(model.state_dict()) == set(tiny_llama(num_hidden_layers=2).state_dict())
    with torch.no_grad():
        assert torch.equal(model(input_ids=prompts[0][None]).logits, before)


@pytest.mark.slow
def test_it_brings_the_sparse_policy_to_the_dense_one_and_leaves_that_alone(parts, prompts):
    before, model, adapter, rollouts, found = parts
    own = {id(p) for p in adapter.parameters}
    weights = [p.clone() for p in model.parameters() if id(p) not in own]
    graphs = len(rollouts.session.backend.graphs)
    ids, mask = left_padded([p for p in prompts for _ in range(4)], found.tokens.device)
    losses = []
    for n in range(12):
        losses.append(adapter.learn(found, ids, mask, torch.zeros(8), rollouts.plan)["kl"])
        found = rollouts(prompts, 4, new_tokens=NEW, generator=seeded(n))
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert len(rollouts.session.backend.graphs) == graphs
    assert all(torch.equal(p, w) for p, w in zip((p for p in model.parameters() if id(p) not in own), weights, strict=True))
    with torch.no_grad():
        assert torch.equal(model(input_ids=prompts[0][None]).logits, before)
    better = adapter.learn(found, ids, mask, torch.ones(8), rollouts.plan)
    assert better["ppo"] == pytest.approx(-1.0, abs=1e-4)  # the ratio of a policy to itself is 1
