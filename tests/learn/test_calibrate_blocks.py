"""Calibration of BlockSparse by layer and head: targets are met as plans are applied; errors and pairs are what they say."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

import tsa_compile as tsa
from tests.api.tiny import tiny_llama
from tsa_compile.check import compare_logits
from tsa_compile.kernels.kept import pairs_read
from tsa_compile.learn import block_calls
from tsa_compile.learn.block_calls import handled
from tsa_compile.learn.block_meter import BlockMeter
from tsa_compile.learn.block_tables import Tables
from tsa_compile.learn.equal_pairs import cheapest
from tsa_compile.learn.output_errors import OutputErrors, relative_errors
from tsa_compile.session import Session

LAST, LENGTH = 32, 1100
BASE = tsa.BlockSparse(window=16, last_dense=100)
OPTIONS = dict(policy=BASE, alphas=(0.9, 0.5, 0.1, 0.005), last=LAST, progress=False)


class Block(nn.Module):
    """Heads of unlike sharpness: pairs are worth more in some of them."""

    def __init__(self, sharp):
        super().__init__()
        self.qkv, self.out, self.sharp = nn.Linear(32, 96), nn.Linear(32, 32), torch.tensor(sharp)[:, None, None]

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        attended = nn.functional.scaled_dot_product_attention(q * self.sharp, k, v, is_causal=True)
        return x + self.out(attended.transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(128, 32), nn.Linear(32, 128)
        self.blocks = nn.ModuleList(Block(sharp) for sharp in ((3.0, 40.0), (30.0, 8.0), (2.0, 60.0)))

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Decoder().eval()


@pytest.fixture(scope="module")
def prompts():
    """Stretches that repeat a few tokens, so that some key blocks matter more than others."""
    torch.manual_seed(1)
    few = torch.randint(1, 128, (8, 3))
    return [torch.cat([few[n][torch.randint(0, 3, (100,))] for n in torch.randint(0, 8, (11,))])[:LENGTH] for _ in range(2)]


def applied(model, plan, ids):
    """(KL at the end of the sparse rows, in the middle, pairs) of `transform(model, plan)`, by nothing of the calibration."""
    bits = []

    def look(number, call):
        bits.append(call._bits)
        return call.sparse()[0]

    ids = ids.reshape(1, -1)
    with torch.no_grad():
        dense = model(input_ids=ids)
        dense = getattr(dense, "logits", dense)[0]
        with handled(look):
            sparse = Session(model, plan)(input_ids=ids)
        tsa.transform(model, plan)
        again = model(input_ids=ids)
        tsa.restore(model)
    sparse = getattr(sparse, "logits", sparse)[0]
    assert torch.equal(getattr(again, "logits", again)[0], sparse)
    end = (ids.shape[1] - BASE.last_dense) // 128 * 128
    middle = (ids.shape[1] - LAST) // 2
    kl = [compare_logits(dense[s : s + LAST], sparse[s : s + LAST]).kl for s in (end - LAST, middle)]
    return *kl, torch.cat([pairs_read(b, ids.shape[1])[0] for b in bits]).mean().item()


@pytest.mark.parametrize("target", ["pairs<=0.8", pytest.param("kl<=0.01", marks=pytest.mark.slow)])
def test_the_plan_meets_its_target_when_it_is_applied(model, prompts, target, tmp_path):
    prompts, method = (prompts[:1], "error") if target.startswith("pairs") else (prompts, "loss")
    plan = tsa.calibrate(model, prompts, target, method=method, **OPTIONS)
    assert model._compiled_call_impl is None
    end, middle, pairs = (sum(x) / len(prompts) for x in zip(*(applied(model, plan, p) for p in prompts), strict=True))
    measured = plan.notes["measured"]
    assert (measured["kl_end"], measured["kl_middle"]) == (pytest.approx(end, rel=1e-3), pytest.approx(middle, rel=1e-3))
    assert measured["pairs"] == pytest.approx(pairs)
    assert pairs <= 0.8 if target.startswith("pairs") else (end + middle) / 2 <= 0.01
    assert (len(plan.rules), plan.prefill) == (3, tsa.Dense())
    for _, _, policy in plan.rules:
        assert dataclasses.replace(policy, alpha=BASE.alpha) == BASE
    plan.save(tmp_path / "plan.json")
    assert tsa.Plan.load(tmp_path / "plan.json") == plan


def test_alphas_by_head_lose_less_than_one_at_no_more_pairs(model, prompts):
    plan = tsa.calibrate(model, prompts[:1], "pairs<=0.8", **OPTIONS)
    ways = plan.notes["ways to spread as many pairs"]
    loss = {name: way["kl_end"] + way["kl_middle"] for name, way in ways.items()}
    assert all(way["pairs"] <= 0.8 for way in ways.values())
    assert loss[plan.notes["alphas"]] < 0.9 * loss["one alpha"]
    assert set(loss) == {"one alpha", "by head", "by head and layer", "by head and layer, in context"}
    one = tsa.calibrate(model, prompts[:1], "pairs<=0.8", **{**OPTIONS, "method": "one"})
    alpha = one.rules[0][2].alpha
    assert isinstance(alpha, float)
    assert {policy.alpha for _, _, policy in one.rules} == {alpha}


@pytest.mark.parametrize("share", ["group", pytest.param("head", marks=pytest.mark.slow)])
def test_tables_are_those_of_each_head(share, prompts):
    torch.manual_seed(0)
    llama, base = tiny_llama(num_hidden_layers=2, max_position_embeddings=1024), dataclasses.replace(BASE, share=share)
    given = {"input_ids": prompts[0].reshape(1, -1), "use_cache": False, "logits_to_keep": LAST}
    meter = BlockMeter(llama, base, LAST)
    assert meter.find_layers(given) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    errors, pairs = meter.tables(given, (0.9, 0.2))
    lists = 4 if share == "head" else 2
    assert (errors.shape, meter.lists, meter.projected) == ((2, 2 * lists), [lists, lists], True)
    seen = []

    def look(number, call):
        out, exact = call.sparse([0.2])[0], call.dense()
        weight = llama.model.layers[number].self_attn.o_proj.weight
        project = lambda x: x.transpose(1, 2).flatten(2) @ weight.T  # noqa: E731
        for h in range(4):
            one = exact.clone()
            one[:, h] = out[:, h]
            seen.append(float((project(one) - project(exact)).square().sum() / project(exact).square().sum()))
        return exact

    meter._run(look, given)
    want = torch.tensor(seen).unflatten(0, (2 * lists, -1)).sum(1)
    torch.testing.assert_close(errors[1].float(), want, rtol=1e-3, atol=1e-9)
    assert ((pairs[0] <= pairs[1]) & (pairs > 0.2) & (pairs <= 1)).all()


def test_pairs_are_counted_one_by_one():
    torch.manual_seed(0)
    bits = torch.randint(0, 1 << 12, (2, 3, 5, 1))
    length = 4 * 128 + 37
    key, row = torch.arange(length), torch.arange(length)[:, None]
    read = (bits[:, :, row[:, 0] // 128, 0, None] >> (key // 64) & 1).bool() & (key < row // 128 * 128) | (
        key >= row // 128 * 128
    )
    want = (read & (key <= row)).sum((2, 3)) / (length * (length + 1) / 2)
    torch.testing.assert_close(pairs_read(bits, length), want.double())


@pytest.mark.slow
def test_an_interrupted_calibration_goes_on_and_gives_the_same(model, prompts, tmp_path, monkeypatch):
    runs, predict = [], BlockMeter._predict
    stop = None

    def counted(self, *args):
        if len(runs) == stop:
            raise KeyboardInterrupt
        runs.append(1)
        return predict(self, *args)

    monkeypatch.setattr(BlockMeter, "_predict", counted)
    whole = tsa.calibrate(model, prompts[:1], "pairs<=0.8", **OPTIONS)
    number = len(runs)
    runs.clear()
    for n in (6, number - 4):
        stop = n
        with pytest.raises(KeyboardInterrupt):
            tsa.calibrate(model, prompts[:1], "pairs<=0.8", state=tmp_path / "state.json", **OPTIONS)
    stop = None
    assert tsa.calibrate(model, prompts[:1], "pairs<=0.8", state=tmp_path / "state.json", **OPTIONS) == whole
    assert len(runs) <= number + 2 * 2  # of the dense model and to find its layers
    state = json.loads((tmp_path / "state.json").read_text())
    assert "alpha" not in state["key"]["policy"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "sparsity>=0.5"}, 'target must be "kl<=X" or "pairs<=X" for BlockSparse'),
        ({"target": "pairs<=0.01"}, "cannot be met: 0.[0-9]* of the pairs are read where the fewest are"),
        ({"target": "kl<=1e-12"}, "cannot be met: kl is 0.0.* with alpha 0.2, where 0.[0-9]* of the pairs"),
        ({"coverages": (0.1,)}, "coverages must be None for BlockSparse"),
        ({"policy": tsa.TokenSparse()}, "alphas must be None for TokenSparse"),
        ({"policy": tsa.TokenSparse(), "alphas": None, "target": "pairs<=0.8"}, 'must be "kl<=X" or "sparsity>=X"'),
        ({"alphas": (0.5,)}, "alphas must be two or more numbers"),
        ({"alphas": (0.5, 1.0)}, "alphas must be two or more numbers"),
        ({"method": "drift"}, "method must be one of .*'one'.* for BlockSparse, got 'drift'"),
        ({"policy": dataclasses.replace(BASE, alpha=(0.1, 0.2))}, "policy.alpha must be one number"),
        ({"prompts": [torch.ones(150, dtype=torch.long)]}, "150 tokens is too short to compare two times 32"),
    ],
)
def test_what_cannot_be_done_is_a_clear_error(model, prompts, changes, message):
    given = {"prompts": prompts[:1], "target": "pairs<=0.8", **OPTIONS, "alphas": (0.9, 0.2), "method": "one", **changes}
    with pytest.raises(ValueError, match=message):
        tsa.calibrate(model, given.pop("prompts"), given.pop("target"), **given)


def test_a_batch_or_padding_is_refused():
    q, bits = torch.zeros(2, 1, 8, 16), torch.zeros(2, 1, 1, 1, dtype=torch.long)
    calls = block_calls._Calls(lambda number, call: call.dense())
    with pytest.raises(ValueError, match="only whole prompts without padding"):
        calls.attend(q, q, q, bits, None, 1, None, None, None, 1.0, False)
    with pytest.raises(ValueError, match="only whole prompts without padding"):
        calls.attend(q[:1], q[:1], q[:1], bits[:1], None, 1, None, None, q[:1, 0, :, 0] == 0, 1.0, False)


def test_one_alpha_lies_between_those_tried():
    pairs = torch.tensor([[0.1, 0.1], [0.2, 0.4], [0.5, 0.7]], dtype=torch.float64)
    tables = Tables((0.5, 0.1, 0.02), 1 - pairs, pairs, ("a", "b"), (1, 1), (2, 2))
    assert (tables.one(0.05), tables.one(0.9)) == (tables.uniform(0.5), tables.uniform(0.02))
    assert tables.one(0.3)["a"] == pytest.approx((0.1, 0.1), rel=1e-4)
    assert tables.one(0.2)["b"][0] == pytest.approx(0.5 * 0.2**0.63093, rel=1e-3)  # log(2) / log(3) of the way
    assert tables.fit(0.6, {"a": 1.0, "b": 1e-9})["a"] == (0.02, 0.02)
    assert tables.errors_at({"a": (0.4, 0.4), "b": (0.03, 0.03)}) == {"a": pytest.approx(0.9), "b": pytest.approx(0.3)}


def test_the_cheapest_within_the_room():
    cost, read = torch.tensor([[9.0, 1.0], [1.0, 0.5], [0.0, 0.0]]), torch.tensor([[1.0, 1.0], [2.0, 2.0], [9.0, 9.0]])
    assert cheapest(cost, read, 3.0).tolist() == [1, 0]
    assert cheapest(cost, read, 4.0).tolist() == [1, 1]
    assert cheapest(cost, read, 0.5).tolist() == [0, 0]


def test_errors_of_a_layer_without_a_projection_are_the_heads_own():
    torch.manual_seed(0)
    exact, out = torch.randn(1, 3, 5, 4), torch.randn(1, 3, 5, 4)
    wrong = (out - exact).square().sum((0, 2, 3))
    torch.testing.assert_close(OutputErrors(exact, None).of(out), wrong / exact.square().sum())
    torch.testing.assert_close(OutputErrors(exact, torch.eye(12)).of(out), wrong / exact.square().sum())
    torch.testing.assert_close(relative_errors(out, exact), (wrong / exact.square().sum((0, 2, 3))).sqrt())
