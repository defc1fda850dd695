"""Sparse rollouts in TRL's GRPO: a few steps of a tiny model, and the loss that its weights make."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

import tsa_compile as tsa
from tests.api.tiny import tiny_llama
from tsa_compile.learn.gate import schedule_plan
from tsa_compile.rl.corrections import importance_weights
from tsa_compile.rl.rollout_gate import RolloutGate
from tsa_compile.rl.trl import SparseGRPO, SparseRollouts, check_trainer, weighted

EXACT = tsa.Plan(prefill=tsa.Dense(), decode=tsa.Exact())


def made_model():
    return tiny_llama(num_hidden_layers=2, initializer_range=0.12, eos_token_id=1)


def test_weights_multiply_each_term_of_the_clipped_loss():
    ratio, advantages, weights = torch.rand(4, 6) * 2, torch.randn(4), torch.rand(4, 5) * 2

    def loss(a):
        return -torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a)

    found = loss(weighted(advantages, weights, 6))
    torch.testing.assert_close(found[:, :5], weights * loss(advantages[:, None])[:, :5])
    torch.testing.assert_close(found[:, 5:], loss(advantages[:, None])[:, 5:])
    off = importance_weights(torch.randn(4, 6), torch.randn(4, 6), torch.ones(4, 6, dtype=torch.bool), cap=None)
    assert torch.equal(weighted(advantages, off.weights, 6), advantages[:, None].expand(4, 6))


def test_what_does_not_go_together_is_named():
    args = SimpleNamespace(top_p=0.9, top_k=0, min_p=None, repetition_penalty=1.0)
    state = SimpleNamespace(deepspeed_plugin=None)
    accelerator = SimpleNamespace(state=state)
    trainer = SimpleNamespace(
        args=args, use_vllm=True, tools=[], is_fsdp_enabled=False, loss_type="dapo", accelerator=accelerator
    )
    with pytest.raises(ValueError, match=r"top_p=0.9: tokens are drawn.*; use_vllm; a trainer without .*SparseGRPO"):
        check_trainer(trainer, 2.0)
    args.top_p, trainer.use_vllm = 1.0, False
    check_trainer(trainer, None)


@pytest.fixture
def parts(tmp_path):
    """(trainer class, what all trainers here are made with)."""
    trl = pytest.importorskip("trl", reason="the extra `rl` is not installed")
    datasets = pytest.importorskip("datasets", reason="the extra `rl` is not installed")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    torch._dynamo.reset()
    words = {f"w{i}": i for i in range(2, 126)} | {"<pad>": 0, "<end>": 1, "<unknown>": 126}
    own = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>")
    g = torch.Generator().manual_seed(5)
    texts = [" ".join(f"w{i}" for i in torch.randint(2, 126, (n,), generator=g).tolist()) for n in (90, 100, 110, 120)]
    args = trl.GRPOConfig(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=8, num_generations=4, max_completion_length=8,
        learning_rate=1e-2, beta=0.0, report_to=[], use_cpu=True, bf16=False, save_strategy="no", logging_steps=1,
        disable_tqdm=True, seed=0,
    )  # fmt: skip

    class Trainer(SparseGRPO, trl.GRPOTrainer):
        """Corrected."""

    made = dict(
        args=args,
        train_dataset=datasets.Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [float(sum(int(w[1:]) % 2 for w in c.split() if w[0] == "w")) for c in completions],
    )
    return Trainer, made


@pytest.mark.slow
@pytest.mark.parametrize("form", ["full", "lora"])
def test_training_through_the_gate(parts, form):
    Trainer, made = parts
    if form == "lora":
        import peft

        made["peft_config"] = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    made["args"].max_steps = 5
    model = made_model()
    gate = RolloutGate([(0,), (2,)], threshold=0.999, dense_layers=1, least=20)
    rollouts = SparseRollouts(gate, batch=8, look_every=4)
    trainer = Trainer(model=model, rollout_func=rollouts, **made)
    seen, graphs = [], []
    score = trainer._generate_and_score_completions

    def watched(inputs):
        output = score(inputs)
        graphs.append(len(rollouts.rollouts.session.backend.graphs))
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
        mask = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
        with torch.no_grad():
            own = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, output["completion_ids"].shape[1])[0]
        there = output["completion_mask"].bool()
        torch.testing.assert_close(own[there], rollouts.last.dense[there], atol=2e-5, rtol=0)  # TRL's own, of these weights
        torch.testing.assert_close(output["sampling_per_token_logps"][there], rollouts.last.sparse[there])
        assert output["advantages"].shape == there.shape
        seen.append(own[there].mean().item())
        return output

    trainer._generate_and_score_completions = watched
    trainer.train()
    assert len(set(seen)) == 5
    assert graphs[0] < graphs[2] == graphs[4]  # prompts of another length, and exact decode, make graphs; new weights make none
    assert [row["decode"] for row in rollouts.history] == ["(0,)", "(2,)", *["exact decode"] * 3]
    assert rollouts.history[0]["worst_acceptance"] < 0.999
    assert rollouts.history[0]["pages"] < rollouts.history[1]["pages"] < 1
    assert "pages" not in rollouts.history[4]
    assert any(site.replaced and site.policy == "Exact" for site in rollouts.rollouts.report.sites)
    assert rollouts.history[4]["acceptance"] > 0.9999
    assert rollouts.history[4]["effective_size"] > 0.9999
    assert rollouts.history[0]["effective_size"] < rollouts.history[4]["effective_size"]
    logged = trainer.state.log_history[0]
    assert logged["rollout/effective_size"] == pytest.approx(rollouts.history[0]["effective_size"], rel=1e-3)
    json.dumps(rollouts.history)
    assert model._compiled_call_impl is None


@pytest.mark.slow
def test_weights_reach_the_gradient(parts):
    """With each weight 0 nothing is learned; with cap=None the step is that of TRL's own loss on the same tokens."""
    Trainer, made = parts
    made["args"].max_steps = 1

    def after(**change):
        torch.manual_seed(0)
        model = made_model()
        rollouts = SparseRollouts(schedule_plan((0,), dense_layers=1), batch=8, **change)
        kind = Trainer if change.get("cap") is not None else Trainer.__mro__[2]
        trainer = kind(model=model, rollout_func=rollouts, **made)
        trainer.train()
        return torch.cat([p.detach().flatten() for p in model.parameters()]), rollouts

    torch.manual_seed(0)
    begin = torch.cat([p.detach().flatten() for p in made_model().parameters()])
    dropped, rollouts = after(cap=1e-6, drop=True)
    assert rollouts.history[0]["over_cap"] == 1.0
    assert torch.equal(dropped, begin)
    plain, wide, tight = (after(cap=cap)[0] for cap in (None, 1e6, 1.0))
    assert not torch.equal(plain, begin)
    assert not torch.equal(plain, wide)
    assert not torch.equal(wide, tight)


@pytest.mark.slow
def test_an_adapter_is_trained_beside_and_is_in_no_step_of_the_trainer(parts):
    pytest.importorskip("peft", reason="the extra `rl` is not installed")
    from peft.tuners.tuners_utils import BaseTunerLayer

    from tsa_compile.rl.distill import SparseAdapter

    Trainer, made = parts
    torch.manual_seed(0)
    model = made_model()
    adapter = SparseAdapter(model, rank=2, lr=1e-2)
    rollouts = SparseRollouts(schedule_plan((0,), dense_layers=1), batch=8, adapter=adapter)
    trainer = Trainer(model=model, rollout_func=rollouts, **made)
    own = {id(p) for p in adapter.parameters}
    before = [p.clone() for p in model.parameters()]
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert layers
    switched = []
    compute = trainer._compute_loss

    def watched(model_, inputs):
        switched.append(any(not layer.disable_adapters for layer in layers))
        return compute(model_, inputs)

    trainer._compute_loss = watched
    trainer.train()
    assert switched == [False] * 3
    assert not own & {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    changed = {id(p): not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)}
    assert all(changed.values())  # both are trained
    assert [row["distill_kl"] > 0 for row in rollouts.history] == [True] * 3
