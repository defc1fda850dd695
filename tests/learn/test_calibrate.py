"""Calibration: the plan meets its target when it is applied, whoever measures; interruption changes nothing."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

import tsa_compile as tsa
from tests.api.tiny import tiny_llama, token_ids
from tsa_compile.check import compare_logits
from tsa_compile.learn import meter
from tsa_compile.learn.prompt_file import read_prompts
from tsa_compile.learn.search import Step, drift_order, first_where, greedy_order
from tsa_compile.learn.target import Target
from tsa_compile.recorder import record_kept

LAYERS, LAST = 4, 32
BASE = tsa.TokenSparse(window=8, pool=3, min_tokens=8, completion=tsa.Completion(4, 2, 4))
OPTIONS = dict(policy=BASE, coverages=(0.1, 0.3, 0.6), last=LAST, progress=False)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in (3 * self.qkv(x)).chunk(3, -1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(attended.transpose(1, 2).flatten(2)) / 3


class Decoder(nn.Module):
    """No Hugging Face; the result is a tensor. Attention that is not flat, so that tokens differ."""

    def __init__(self, layers):
        super().__init__()
        self.embed, self.head = nn.Embedding(128, 32), nn.Linear(32, 128)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))

    def states(self, input_ids):
        states = [self.embed(input_ids)]
        for block in self.blocks:
            states.append(block(states[-1]))
        return states

    def forward(self, input_ids):
        return self.head(self.states(input_ids)[-1])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Decoder(LAYERS).eval()


@pytest.fixture(scope="module")
def prompts():
    torch.manual_seed(1)
    return [token_ids(120), token_ids(90)[0], {"input_ids": token_ids(100)[0].tolist()}]


def applied(model, plan, prompts):
    """(KL, sparsity) of `transform(model, plan)`, measured with nothing of the calibration."""
    ids = [torch.as_tensor(p["input_ids"] if isinstance(p, dict) else p).reshape(1, -1) for p in prompts]

    def run(x):
        out = model(input_ids=x)
        return getattr(out, "logits", out)[0, -LAST:]

    with torch.no_grad():
        dense = [run(x) for x in ids]
        tsa.transform(model, plan)
        with record_kept() as kept:
            sparse = [run(x) for x in ids]
    tsa.restore(model)
    kl = sum(compare_logits(a, b).kl for a, b in zip(dense, sparse, strict=True)) / len(ids)
    return kl, sum(1 - share for share in kept.shares()) / len(ids) / LAYERS


@pytest.mark.parametrize(("target", "method"), [("kl<=0.02", "loss"), ("sparsity>=0.4", "loss"), ("kl<=0.02", "drift")])
def test_the_plan_meets_its_target_when_it_is_applied(model, prompts, target, method):
    plan = tsa.calibrate(model, prompts, target, method=method, **OPTIONS)
    assert model._compiled_call_impl is None
    kl, sparsity = applied(model, plan, prompts)
    assert Target.parse(target).met_by(kl, sparsity)
    assert plan.notes["measured"]["kl"] == pytest.approx(kl, rel=1e-4)
    assert plan.notes["measured"]["sparsity"] == pytest.approx(sparsity)
    assert plan.notes["prompt tokens"] == [120, 90, 100]
    assert plan.prefill == tsa.Dense()
    for _, _, policy in plan.rules:
        assert dataclasses.replace(policy, coverage=BASE.coverage) == BASE
    greediest = tsa.Plan(dataclasses.replace(BASE, coverage=0.6))
    assert plan.rules  # neither nothing
    if method == "loss":
        assert applied(model, greediest, prompts)[1] > sparsity  # nor everything


def test_a_hugging_face_model(prompts):
    llama = tiny_llama(num_hidden_layers=2)
    plan = tsa.calibrate(llama, prompts[:1], "sparsity>=0.2", **{**OPTIONS, "coverages": (0.3,)})
    kl, sparsity = applied(llama, plan, prompts[:1])
    assert plan.notes["measured"]["kl"] == pytest.approx(kl, rel=1e-3)
    assert plan.notes["measured"]["sparsity"] == pytest.approx(sparsity * LAYERS / 2)


def test_a_plan_goes_through_json(model, prompts, tmp_path):
    plan = tsa.calibrate(model, prompts, "sparsity>=0.3", **OPTIONS)
    plan.save(tmp_path / "plan.json")
    assert tsa.Plan.load(tmp_path / "plan.json") == plan


def test_an_interrupted_calibration_goes_on_and_gives_the_same(model, prompts, tmp_path, monkeypatch):
    runs = []
    sample = meter.Meter.sample

    def counted(self, *args):
        if len(runs) == stop:
            raise KeyboardInterrupt
        runs.append(args[2])
        return sample(self, *args)

    monkeypatch.setattr(meter.Meter, "sample", counted)
    stop = None
    whole = tsa.calibrate(model, prompts, "kl<=0.02", **OPTIONS)
    number = len(runs)
    for stop in (7, number - 2):
        if stop == 7:
            runs.clear()
        with pytest.raises(KeyboardInterrupt):
            tsa.calibrate(model, prompts, "kl<=0.02", state=tmp_path / "state.json", **OPTIONS)
    stop = None
    resumed = tsa.calibrate(model, prompts, "kl<=0.02", state=tmp_path / "state.json", **OPTIONS)
    assert resumed == whole
    assert len(runs) == number  # nothing was measured twice
    other = {**OPTIONS, "policy": dataclasses.replace(BASE, pool=5)}
    with pytest.raises(ValueError, match="of another calibration, with another policy"):
        tsa.calibrate(model, prompts, "kl<=0.02", state=tmp_path / "state.json", **other)
    with pytest.raises(ValueError, match="with another prompts and model"):
        tsa.calibrate(model, prompts[:2], "kl<=0.02", state=tmp_path / "state.json", **OPTIONS)


def test_a_candidate_costs_no_trace(model, prompts, monkeypatch):
    from tsa_compile import backend

    traces, original = [], backend.TracedGraph
    monkeypatch.setattr(backend, "TracedGraph", lambda *a: (traces.append(1), original(*a))[1])
    tsa.calibrate(model, prompts, "sparsity>=0.3", **OPTIONS)
    assert len(traces) <= 2  # one length and then any length


def test_drift_is_that_of_the_hidden_states(model, prompts):
    plan = tsa.calibrate(model, prompts[:1], "sparsity>=0.1", **OPTIONS)
    with torch.no_grad():
        states = model.states(prompts[0])
    for layer in range(LAYERS):
        moved = (states[layer + 1] - states[layer]).norm(dim=-1) / (states[layer].norm(dim=-1) + 1e-8)
        assert plan.notes["drift"][f"blocks.{layer}"] == pytest.approx(moved.mean().item(), rel=1e-5)
    assert len(plan.notes["drift"]) == LAYERS


class Unnumbered(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.only = nn.Embedding(128, 32), Block()

    def forward(self, input_ids):
        return self.only(self.embed(input_ids))


def test_a_layer_without_a_number_has_no_drift(prompts):
    plain = Unnumbered().eval()
    plan = tsa.calibrate(plain, prompts[:1], "sparsity>=0.1", **OPTIONS)
    assert plan.notes["drift"] == {}
    with pytest.raises(ValueError, match="no drift is known of layers"):
        tsa.calibrate(plain, prompts[:1], "sparsity>=0.1", method="drift", **OPTIONS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "kl<0.01"}, 'target must be "kl<=X" with X > 0, or "sparsity>=X", .* got \'kl<0.01\''),
        ({"target": "kl<=-1"}, "target must be"),
        ({"target": "kl<=nan"}, "target must be"),
        ({"target": "sparsity>=1.0"}, "target must be"),
        ({"target": "speed>=2"}, "target must be"),
        ({"target": 0.01}, "target must be .* got 0.01"),
        ({"target": "kl<=1e-12"}, "'kl<=1e-12' cannot be met: with a single layer sparse kl is 0.0"),
        ({"target": "sparsity>=0.99"}, "cannot be met: with all layers at their largest coverage kl is"),
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": [[1, 2, 3]]}, "prompt 0 has 3 tokens; the policy runs up to 16 dense"),
        ({"prompts": [torch.ones(2, 40, dtype=torch.long)]}, "prompt 0 must be one row"),
        ({"prompts": [{"ids": [1]}]}, "prompt 0 has no input_ids"),
        ({"policy": tsa.Dense()}, "policy must be a TokenSparse"),
        ({"coverages": (0.0, 0.1)}, r"coverages must be numbers in \(0, 1\)"),
        ({"method": "luck"}, "method must be one of .* got 'luck'"),
        ({"last": 0}, "last must be at least 1"),
    ],
)
def test_what_cannot_be_done_is_a_clear_error(model, prompts, changes, message):
    given = {"prompts": prompts[:1], "target": "kl<=0.1", **OPTIONS, "coverages": (0.1, 0.3), **changes}
    with pytest.raises(ValueError, match=message):
        tsa.calibrate(model, given.pop("prompts"), given.pop("target"), **given)


def test_a_transformed_model_is_refused(model, prompts):
    tsa.transform(model)
    try:
        with pytest.raises(RuntimeError, match="restore"):
            tsa.calibrate(model, prompts, **OPTIONS)
    finally:
        tsa.restore(model)


def test_a_part_that_runs_untraced_is_no_silent_success(model, monkeypatch):
    """At the recompile limit Dynamo runs the rest dense, which would look like a perfect plan."""
    torch._dynamo.reset()
    monkeypatch.setattr("tsa_compile.session.lengths_vary", lambda args, kwargs: None)  # so that lengths take graphs of their own
    ids = [token_ids(n) for n in (40, 50, 60)]
    monkeypatch.setattr("tsa_compile.session.room", lambda model: 1)
    with torch._dynamo.config.patch(recompile_limit=1), pytest.raises(RuntimeError, match="ran untraced"):
        tsa.calibrate(model, ids, "kl<=0.02", **OPTIONS)


def test_steps_are_taken_from_the_cheapest_on():
    alone = {
        Step("a", 0.1): (1.0, 0.1), Step("a", 0.2): (1.1, 0.4),  # the jump to 0.2 is better than stopping at 0.1
        Step("b", 0.1): (0.1, 0.2), Step("b", 0.2): (9.0, 0.3),
        Step("c", 0.1): (0.0, 0.0), Step("c", 0.2): (0.5, 0.0),  # drops nothing
    }  # fmt: skip
    assert greedy_order(alone) == [Step("b", 0.1), Step("a", 0.2), Step("b", 0.2)]
    order = drift_order({"a": 3.0, "b": 1.0, "c": 2.0}, (0.1, 0.2))
    assert order[:4] == [Step("b", 0.1), Step("c", 0.1), Step("a", 0.1), Step("b", 0.2)]
    assert all(first_where(lambda n, t=t: n >= t, 0, 9) == t for t in range(1, 10))


def test_the_command_writes_a_plan(tmp_path, monkeypatch, capsys):
    from tsa_compile.frontends.cli import app

    tiny_llama(num_hidden_layers=2).save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(token_ids(n)[0].tolist()) for n in (90, 120)))
    (tmp_path / "policy.json").write_text(json.dumps(BASE.to_dict()))
    args = ["--prompts", "prompts.jsonl", "--policy", "policy.json", "--coverages", "0.1,0.4", "--state", "state.json"]
    monkeypatch.chdir(tmp_path)
    app(["calibrate", "model", "--out", "plan.json", *args, "--target", "sparsity>=0.2"], standalone_mode=False)
    assert "layers sparse" in capsys.readouterr().out
    assert tsa.Plan.load(tmp_path / "plan.json").notes["prompt tokens"] == [90, 120]


@pytest.mark.parametrize(
    ("line", "message"),
    [("[1, 2.5]", r":1: expected a string, a list of token ids"), ("{", ":1: not JSON"), ('{"txt": "a"}', ":1: expected")],
)
def test_a_wrong_prompt_file_is_named(tmp_path, line, message):
    (tmp_path / "p.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        list(read_prompts([tmp_path / "p.jsonl"], lambda: None))


def test_prompts_are_text_or_ids_and_lose_their_beginning(tmp_path):
    (tmp_path / "p.jsonl").write_text('"abc"\n\n[1, 2, 3]\n{"text": "xy"}\n')
    (tmp_path / "p.txt").write_text("one\n\ntwo")
    tokenizer = lambda: lambda text: type("Encoded", (), {"input_ids": list(map(ord, text))})  # noqa: E731
    got = list(read_prompts([tmp_path / "p.jsonl", tmp_path / "p.txt"], tokenizer, 2))
    assert got == [[98, 99], [2, 3], [120, 121], [119, 111]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--out": "no/such/plan.json"}, "--out: no/such/plan.json cannot be written"),
        ({"--coverages": "abc"}, "--coverages must be numbers, comma separated, got 'abc'"),
        ({"--policy": "broken.json"}, "--policy broken.json: "),
        (
            {"--policy": "dense.json"},
            "--policy dense.json: policy must be a TokenSparse, a BlockSparse or a PageSparse, got Dense",
        ),
    ],
)
def test_what_is_wrong_on_the_command_line_is_said_at_once(tmp_path, monkeypatch, changes, message):
    from tsa_compile.frontends.cli import app

    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("[]")
    (tmp_path / "dense.json").write_text('{"policy": "Dense"}')
    options = {"--prompts": "p.jsonl", "--out": "plan.json", **changes}
    with pytest.raises(ValueError, match=message):
        app(["calibrate", "model", *(x for pair in options.items() for x in pair)], standalone_mode=False)
