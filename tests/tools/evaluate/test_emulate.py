"""The emulation on a random model: masks against a plain softmax, indexes against the true masses, shares that are hit."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from tests.kernels.flat import select_tokens_reference, sparse_attention_reference
from tests.tools.evaluate.tiny_lm import byte_tokenizer, tiny_lm
from tsa_compile.tools.evaluate.emulate import Job, read_texts
from tsa_compile.tools.evaluate.emulate_attention import causal_pairs, masked_attention
from tsa_compile.tools.evaluate.emulate_blocks import BlockMask, BlockRule, TokenMask
from tsa_compile.tools.evaluate.emulate_decode import DecodeText
from tsa_compile.tools.evaluate.emulate_fit import by_error, collect
from tsa_compile.tools.evaluate.emulate_levels import levels
from tsa_compile.tools.evaluate.emulate_model import Emulator, Layer, dense
from tsa_compile.tools.evaluate.emulate_pages import Index, build, log_masses, low_rank, rotate
from tsa_compile.tools.evaluate.emulate_prefill import Reference, run_rule
from tsa_compile.tools.evaluate.emulate_select import DecodeRule

LENGTH = 600
SMALL = BlockRule(rows=64, keys=32, window=32, last_dense=64)
RULES = [
    SMALL,
    dataclasses.replace(SMALL, share="union", sub=16),
    dataclasses.replace(SMALL, share="group", select="mass", masses="exact"),
    dataclasses.replace(SMALL, select="top", pool=8, stride=2),
    dataclasses.replace(SMALL, coarse=128, normal="tile", reduce="max", rounded=True),
    dataclasses.replace(SMALL, coverage=0.9, dense_layers=(0,)),
]


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    torch.manual_seed(0)
    model = tiny_lm().eval()
    for p in model.parameters():
        p.data *= 3.0 if p.dim() > 1 else 1.0  # attention that is not uniform
    return Emulator(model)


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    return torch.randint(2, 250, (LENGTH,), generator=torch.Generator().manual_seed(1))


def layer(length: int = 200, heads: int = 4) -> Layer:
    torch.manual_seed(2)
    q, k, v = torch.randn(heads, length, 8), torch.randn(2, length, 8), torch.randn(2, length, 8)
    return Layer(0, q, k, v, 8**-0.5, None, None, torch.randn(32, heads * 8))


def plain(one: Layer, visible: torch.Tensor) -> torch.Tensor:
    k, v = (x.double().repeat_interleave(one.group, 0) for x in (one.k, one.v))
    logits = (one.q.double() @ k.mT * one.scale).masked_fill(~visible.tril(), -torch.inf)
    return logits.softmax(-1) @ v


def test_the_model_runs_as_it_is_under_dense_attention(emulator, text):
    model = tiny_lm().eval()
    model.load_state_dict(emulator.model.state_dict())
    with torch.no_grad():
        expected = model(input_ids=text[None], use_cache=False).logits[0]
    torch.testing.assert_close(emulator.logits(emulator.run(text, dense)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [64, 130, 200])
def test_a_list_of_blocks_is_a_mask(length):
    one = layer(length)
    rule = dataclasses.replace(SMALL, last_dense=0)
    rows, keys = -(-length // 64), -(-length // 32)
    keep = torch.rand(4, rows, keys) < 0.3
    visible = (keep | rule.forced(length, keep.device)).repeat_interleave(64, 1).repeat_interleave(32, 2)[:, :length, :length]
    out, pairs = masked_attention(one, BlockMask(rule, one, keep, None), chunk=64)
    torch.testing.assert_close(out.double(), plain(one, visible), atol=1e-5, rtol=1e-5)
    assert pairs.tolist() == visible.tril().sum((1, 2)).tolist()


def test_means_of_equal_keys_complete_exactly():
    one = layer(256)
    k, v = (x.unflatten(1, (-1, 16))[:, :, :1].expand(-1, -1, 16, -1).flatten(1, 2) for x in (one.k, one.v))
    one = dataclasses.replace(one, k=k, v=v)
    rule = dataclasses.replace(SMALL, completion=16)
    nothing = torch.zeros(4, 4, 8, dtype=torch.bool)
    out, pairs = masked_attention(one, BlockMask(rule, one, nothing, None))
    assert int(pairs[0]) < causal_pairs(256)
    torch.testing.assert_close(out.double(), plain(one, torch.ones(256, 256, dtype=torch.bool)), atol=1e-5, rtol=1e-5)


def test_token_mask_is_the_operator():
    one = layer(1500)
    out, _ = masked_attention(one, TokenMask(one, 0.3, window=40, sinks=3, heavy=20))
    q, k, v = one.q[None], one.k[None], one.v[None]
    chosen = select_tokens_reference(q, k, None, one.scale, 0.3, 128, 7, 1024, 20)
    expected = sparse_attention_reference(q, k, v, *chosen, None, one.scale, 40, 3, 0)
    torch.testing.assert_close(out, expected[0], atol=1e-5, rtol=1e-5)


def test_levels_are_masses_over_the_largest():
    one = layer(256)
    rule = dataclasses.replace(SMALL, last_dense=0, sinks=0, window=0)
    found = levels(rule, one)
    means = one.k[0].double().unflatten(0, (8, 32)).mean(1)
    masses = (one.q[1, 128:192].double() @ means[:4].T * one.scale).softmax(-1).mean(0)  # the blocks before row 128
    torch.testing.assert_close(found[1, 2, :4].double(), masses / masses.max(), atol=1e-5, rtol=1e-5)
    exact = levels(dataclasses.replace(rule, masses="exact"), one)
    logits = one.q[1, 128:192].double() @ one.k[0, :128].double().T * one.scale
    masses = logits.softmax(-1).unflatten(1, (4, 32)).sum(2).mean(0)
    torch.testing.assert_close(exact[1, 2, :4].double(), masses / masses.max(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.select}-{r.share}-{r.masses}")
def test_thresholds_hit_the_share(emulator, text, rule):
    found = collect(emulator, text, rule)
    base = found.base() / found.pairs
    share = (1 + base) / 2
    run = run_rule(emulator, text, rule, found.threshold(share))
    assert base < run.share() <= share + 0.02
    assert found.read(found.threshold(share)) <= share
    whole = Reference(emulator, text).compare(run_rule(emulator, text, rule, -torch.inf), rule.last_dense)
    assert whole["pairs"] == 1.0
    assert whole["kl_tail"] < 1e-6
    with pytest.raises(ValueError, match="always reads"):
        found.threshold(base / 2)


def test_by_error_spends_pairs_where_they_help():
    costs = [{0: torch.tensor([9.0, 1.0])}, {0: torch.tensor([1.0, 0.9])}]
    reads = [{0: torch.tensor([10.0, 10.0])}, {0: torch.tensor([20.0, 20.0])}]
    assert by_error(costs, reads, [0.5, 0.25], 30.0)[0].tolist() == [0.25, 0.5]
    assert by_error(costs, reads, [0.5, 0.25], 40.0)[0].tolist() == [0.25, 0.25]


def stored(index: Index, k, rotation=None, bias=None):
    return {name: x[0] for name, x in build(index, k[None], rotation, bias).items()}


@pytest.mark.parametrize("index", [Index("exact"), Index("basis", rank=15), Index("mean", parts=16)])
def test_complete_indexes_give_the_true_masses(index):
    q, k = torch.randn(3, 5, 8), torch.randn(64, 8)
    expected = (q @ k.T * 0.3).unflatten(-1, (-1, 16)).logsumexp(-1)
    torch.testing.assert_close(log_masses(index, stored(index, k), q, 0.3), expected, atol=1e-4, rtol=1e-4)


def test_bounds_and_estimates_of_a_page():
    q, k = torch.randn(3, 5, 8), torch.randn(64, 8)
    logits = (q @ k.T * 0.3).unflatten(-1, (-1, 16))
    lower = log_masses(Index("mean"), stored(Index("mean"), k), q, 0.3)
    upper = log_masses(Index("minmax"), stored(Index("minmax"), k), q, 0.3)
    assert (lower <= logits.logsumexp(-1) + 1e-5).all()
    assert (upper >= logits.logsumexp(-1) - 1e-5).all()
    variance = k.unflatten(0, (-1, 16)).var(1, correction=0)
    expected = lower + 0.5 * 0.09 * q.square() @ variance.T
    torch.testing.assert_close(log_masses(Index("variance"), stored(Index("variance"), k), q, 0.3), expected)


def test_a_constant_key_before_rotation_is_known_exactly():
    angle = torch.arange(64)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.01])
    rotation = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    bias = torch.randn(1, 8)
    k = rotate(bias.expand(64, 8), rotation, 1)
    torch.testing.assert_close(rotate(k, rotation, -1), bias.expand(64, 8), atol=1e-5, rtol=1e-5)
    for kind in ("prerope", "unbiased"):
        torch.testing.assert_close(stored(Index(kind), k, rotation, bias)["keys"], k, atol=1e-5, rtol=1e-5)


def test_quantised_bases_stay_close():
    pages = torch.randn(4, 16, 32) + 5.0
    exact = low_rank(pages, 8)
    errors = [float((low_rank(pages, 8, bits) - exact).norm() / exact.norm()) for bits in (4, 8)]
    assert errors[1] < errors[0] < 0.1


def test_decode_by_all_pages_is_exact_and_budgets_are_kept(emulator, text):
    decoded = DecodeText(emulator, text[:592])
    expected = emulator.logits(emulator.run(text[:592], dense))[-128:]
    torch.testing.assert_close(decoded.exact, expected, atol=1e-4, rtol=1e-4)
    whole = decoded.run(DecodeRule(Index("minmax")), 1.0)
    assert whole["kl"] < 1e-6
    assert whole["kept"] == 1.0
    oracle = decoded.run(DecodeRule(Index("exact")), 0.3)
    assert oracle["found"] > 0.999
    assert 0.3 <= oracle["kept"] <= 0.34
    first = decoded.run(DecodeRule(Index("basis", first=0.5)), 0.3)
    assert first["found"] <= oracle["found"]


def test_a_job_resumes(emulator, tmp_path):
    for n in range(2):
        (tmp_path / f"t{n}.txt").write_text("".join(chr(97 + (i * i + n) % 26) for i in range(700)))
    texts = read_texts(tmp_path, byte_tokenizer(False), 592)
    rule = dataclasses.asdict(SMALL)
    prefill = [{"name": by, "rule": rule, "pairs": [0.8], "by": by} for by in ("all", "head", "head and layer")]
    budgets = ("equal", "layer", "head", "cost", "mass")
    decode = [{"name": b, "rule": {"index": {"kind": "mean"}, "dense_layers": [0]}, "keep": [0.4], "budget": b} for b in budgets]
    for _ in range(2):
        job = Job(emulator, texts, tmp_path / "out.jsonl")
        for name in texts:
            for spec in prefill:
                job.prefill(spec, name)
            for spec in decode:
                job.decode(spec, name)
        rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert len(rows) == 16
        assert rows == job.rows
    assert all(row["pairs"] <= 0.9 for row in rows if row["phase"] == "prefill")
    assert all(row["kept_with_dense"] <= 0.45 for row in rows if row["phase"] == "decode")
    with pytest.raises(ValueError, match="fewer than"):
        read_texts(tmp_path, byte_tokenizer(False), 701)


def test_a_rule_says_what_is_wrong():
    with pytest.raises(ValueError, match="share"):
        BlockRule(share="pair")
    with pytest.raises(ValueError, match="coarse"):
        BlockRule(coarse=96)
    with pytest.raises(ValueError, match="kind"):
        Index("median")
