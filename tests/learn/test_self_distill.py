"""Self-distillation: the adapter brings decode by roles to the dense model, and is what does it, in a fresh process too."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import tsa_compile as tsa
from tests.api.tiny import tiny_llama
from tests.cache.models import token_ids
from tsa_compile.cache.head_index import HeadIndex
from tsa_compile.frontends.cli import app
from tsa_compile.index_weights import attach_indexes, load_indexes, save_indexes
from tsa_compile.kernels.types import Rotation
from tsa_compile.learn import indexer_state
from tsa_compile.learn.distillation import Distillation, told_apart
from tsa_compile.learn.routes import divergence
from tsa_compile.learn.self_distill import distill
from tsa_compile.learn.sparse_rows import sparse_logits

peft = pytest.importorskip("peft")
PATH, HEADS = "model.layers.{}.self_attn", ((1,), (0, 3))
STEPS, FACTOR = 16, 0.5  # the KL falls to less than this part of what it was
RECIPE = Distillation(rank=8, steps=STEPS, epochs=12, lr=1e-2)


def made_model():
    """The same at every call, and sharper than models are at first: its heads disagree."""
    torch.manual_seed(0)
    return tiny_llama(num_hidden_layers=2, head_dim=16, initializer_range=0.2)


@pytest.fixture(scope="module")
def texts():
    return [token_ids(n)[0] for n in (100, 116)]


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """Roles with a random index, in a layer each."""
    model, g = made_model(), torch.Generator().manual_seed(3)
    rotation = Rotation(tuple(model.model.rotary_emb.inv_freq.tolist()), False, 1.0)
    weights = [torch.randn(2, len(heads), 4, 16, generator=g) for heads in HEADS]
    path = tmp_path_factory.mktemp("index") / "index.safetensors"
    save_indexes(path, [(PATH.format(n), HeadIndex(HEADS[n], 2, *weights[n], rotation)) for n in range(2)])
    roles = tsa.HeadSplit((), sinks=2, window=20, mass=0.6)
    rules = [(PATH.format(n), "decode", dataclasses.replace(roles, retrieval=heads)) for n, heads in enumerate(HEADS)]
    return tsa.Plan(prefill=tsa.Dense(), decode=roles, rules=rules, weights=str(path))


@pytest.fixture(scope="module")
def trained(texts, plan, tmp_path_factory):
    """(folder with the plan and the adapter, the plan); the model is left as it was. The last text is held out."""
    folder, model = tmp_path_factory.mktemp("trained"), made_model()
    before, grads = {n: p.clone() for n, p in model.named_parameters()}, [p.requires_grad for p in model.parameters()]
    made = distill(model, texts, plan, folder / "plan.json", RECIPE, progress=False)
    assert {n for n, _ in model.named_parameters()} == set(before)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert [p.requires_grad for p in model.parameters()] == grads
    return folder, made


def dense(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, logits_to_keep=STEPS).logits[0]


def kl(model, ids, plan, wanted):
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(ids.shape[1])[None]}
    with torch.no_grad():
        return float(divergence(wanted, sparse_logits(model, given, ids.shape[1] - STEPS, plan)[0, 1:]).mean())


def test_others_are_as_if_they_were_one():
    logits = torch.randn(3, 9, dtype=torch.float64)
    names = logits.topk(4).indices
    p = logits.softmax(-1)
    known = p.gather(-1, names)
    torch.testing.assert_close(told_apart(logits, names).exp(), torch.cat([known, 1 - known.sum(-1, keepdim=True)], -1))


def test_the_adapter_brings_steps_to_the_dense_model_and_is_what_does_it(trained, texts, plan):
    folder, made = trained
    assert tsa.Plan.load(folder / "plan.json").notes == made.notes
    assert made.notes["adapter"]["folder"] == "plan.adapter"
    model = made_model()
    attach_indexes(model, load_indexes(plan.weights))
    bound = plan.bind(model)
    wanted = [dense(model, ids[None]) for ids in texts]
    without = sum(kl(model, ids[None], bound, w) for ids, w in zip(texts, wanted, strict=True))
    peft.PeftModel.from_pretrained(model, folder / "plan.adapter")
    with_it = sum(kl(model, ids[None], bound, w) for ids, w in zip(texts, wanted, strict=True))
    assert without > 0.1
    assert with_it < FACTOR * without


def test_an_interrupted_training_goes_on_with_the_same_result(texts, plan, tmp_path, monkeypatch):
    saved, recipe, calls = indexer_state.TrainingState.did, dataclasses.replace(RECIPE, epochs=2), []

    def interrupted(self, done, losses):
        saved(self, done, losses)
        calls.append(done)
        if done == 3:
            raise KeyboardInterrupt

    whole = distill(made_model(), texts, plan, tmp_path / "whole.json", recipe, progress=False)
    monkeypatch.setattr(indexer_state.TrainingState, "did", interrupted)
    rest = (texts, plan, tmp_path / "plan.json", recipe)
    with pytest.raises(KeyboardInterrupt):
        distill(made_model(), *rest, state=tmp_path / "state", progress=False)
    parts = distill(made_model(), *rest, state=tmp_path / "state", progress=False)
    assert calls == [1, 2, 3, 4]
    assert parts.notes["adapter"]["KL of each text"] == whole.notes["adapter"]["KL of each text"]
    changed = (texts, plan, tmp_path / "plan.json", dataclasses.replace(recipe, seed=1))
    with pytest.raises(ValueError, match="of another training, with another seed"):
        distill(made_model(), *changed, state=tmp_path / "state", progress=False)


def test_what_is_wrong_is_named(texts, plan, tmp_path):
    with pytest.raises(ValueError, match=r"Distillation\.rank must be an int >= 1, got 0"):
        Distillation(rank=0)
    with pytest.raises(ValueError, match=r"Distillation\.likeliest must be below the vocabulary's"):
        distill(made_model(), texts, plan, tmp_path / "x.json", Distillation(likeliest=10_000, steps=4), progress=False)
    sampled, blocks = tsa.Plan(prefill=tsa.Dense(), decode=tsa.SampledValues(4)), tsa.Plan(decode=tsa.Exact())
    for given, message in ((sampled, "got SampledValues"), (blocks, "got BlockSparse")):
        model = made_model()
        names = set(model.state_dict())
        with pytest.raises(ValueError, match=message):
            distill(model, texts, given, tmp_path / "x.json", Distillation(steps=4), progress=False)
        assert set(model.state_dict()) == names


def test_the_command_trains_and_says_what_the_held_out_text_shows(texts, plan, tmp_path):
    """A plan without an index, of a model in a folder, whose prompts are token ids."""
    made_model().save_pretrained(tmp_path / "model")
    tsa.Plan(prefill=tsa.Dense(), decode=tsa.PageSparse(keep=0.3)).save(tmp_path / "in.json")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(ids.tolist()) + "\n" for ids in texts))
    files = {"--plan": "in.json", "--prompts": "texts.jsonl", "--out": "out.json"}
    options = [x for name, file in files.items() for x in (name, str(tmp_path / file))]
    call = ["distill", str(tmp_path / "model"), *options, "--held-out", "1", "--steps", "8", "--rank", "2"]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    told = tsa.Plan.load(tmp_path / "out.json").notes["adapter"]
    assert (told["texts"], list(told["held out"])) == (1, ["without adapter", "with adapter"])
    assert f"held-out texts, with adapter: KL {told['held out']['with adapter']:.5f}" in done.output
    assert (tmp_path / "out.adapter/adapter_model.safetensors").is_file()


FRESH = """
import json, sys, torch, peft
import tsa_compile as tsa
from tests.cache.models import cache_name, token_ids
from tests.learn.test_self_distill import made_model
from tsa_compile.learn.routes import divergence

folder, steps = sys.argv[1], int(sys.argv[2])
model, found = made_model(), []
texts = [token_ids(n) for n in (100, 116)]
with torch.no_grad():
    dense = [model(input_ids=ids, use_cache=False, logits_to_keep=steps).logits[0] for ids in texts]
model = peft.PeftModel.from_pretrained(model, folder + "/plan.adapter")
tsa.transform(model, tsa.Plan.load(folder + "/plan.json"))
for ids, wanted in zip(texts, dense, strict=True):
    cache, first = {cache_name(model.get_base_model()): tsa.Cache(model.get_base_model(), 1, 128)}, ids.shape[1] - steps
    with torch.no_grad():
        model(input_ids=ids[:, :first], **cache)
        for n in range(steps):
            logits = model(input_ids=ids[:, first + n : first + n + 1], **cache).logits[0, -1]
            found.append(float(divergence(wanted[n], logits)))
sites = [site.replaced for site in tsa.report(model).sites if site.policy == "HeadSplit"]
print(json.dumps({"kl": sum(found) / len(found), "replaced": sites}))
"""


@pytest.mark.slow
def test_a_fresh_process_decodes_by_plan_and_adapter(trained, texts):
    folder, made = trained
    call = [sys.executable, "-c", FRESH, str(folder), str(STEPS)]
    done = subprocess.run(call, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["replaced"] == [True, True]
    first = made.notes["adapter"]["KL of each text"][:2]  # each at most the KL over all tokens
    assert told["kl"] < FACTOR * sum(first) / 2
