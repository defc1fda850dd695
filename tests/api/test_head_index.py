"""HeadSplit by a learned index: the cache keeps keys projected before rotation, and a step reads what it chooses."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tsa_compile as tsa
from tests.cache.models import cache_name, tiny, token_ids
from tsa_compile.cache.head_index import HeadIndex, indexes
from tsa_compile.index_weights import attach_indexes, load_indexes, save_indexes
from tsa_compile.kernels.types import Rotation
from tsa_compile.session import attached
from tsa_compile.steps import FIXED

transformers = pytest.importorskip("transformers")
PATH, HEADS = "model.layers.{}.self_attn", ((1,), (0, 3))
MASS, POLICY = 0.6, tsa.HeadSplit((), sinks=4, window=20)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random indexes for two layers."""
    model, g = tiny("llama"), torch.Generator().manual_seed(3)
    rotation = Rotation(tuple(model.model.rotary_emb.inv_freq.tolist()), False, 1.0)
    made = []
    for n, heads in enumerate(HEADS):
        query, key = (torch.randn(len(heads), 4, 16, generator=g) for _ in range(2))
        made.append((PATH.format(n), HeadIndex(heads, 2, 3 * query, key, rotation)))
    path = tmp_path_factory.mktemp("index") / "index.safetensors"
    save_indexes(path, made)
    return path


def plan_of(weights, heads=HEADS, **changes):
    rules = [(PATH.format(n), "decode", dataclasses.replace(POLICY, retrieval=h, mass=MASS)) for n, h in enumerate(heads)]
    return tsa.Plan(prefill=tsa.Dense(), decode=POLICY, rules=rules, weights=str(weights), **changes)


@pytest.fixture(scope="module")
def model(weights):
    torch._dynamo.reset()
    return tsa.transform(tiny("llama"), plan_of(weights))


def steps(model, shift=0, padding=37, total=190, prompt=180, name="cache"):
    """(logits of the steps behind a left-padded prompt of 180, the cache); positions are moved by `shift`."""
    ids, cache = token_ids(total, 2), transformers.DynamicCache(config=model.config)
    mask = torch.ones(2, total, dtype=torch.long)
    mask[0, :padding] = 0
    found = []
    with torch.no_grad():
        for n in (prompt, *range(prompt + 1, total + 1)):
            first = 0 if n == prompt else n - 1
            at = ((mask.cumsum(1) - 1).clamp_min(0) + shift)[:, first:n]
            call = dict(attention_mask=mask[:, :n], position_ids=at, **{cache_name(model): cache})
            found.append(model(ids[:, first:n], **call).logits[:, -1])
    return torch.stack(found), cache


@contextlib.contextmanager
def hooked(model):
    """The inputs of all attentions before rotation: q `[B, H, L, D]` and k, by layer."""
    seen, handles = {}, []
    for n, layer in enumerate(model.model.layers):
        for which in ("q", "k"):
            keep = lambda m, a, out, at=(n, which): seen.update({at: out.detach().unflatten(-1, (-1, 16)).transpose(1, 2)})  # noqa: E731
            handles.append(getattr(layer.self_attn, f"{which}_proj").register_forward_hook(keep))
    yield seen
    for handle in handles:
        handle.remove()


def kept_of(cache, layer):
    state = cache.layers[layer]
    name = next(kind.name for kind in state.states.kinds if kind.name.startswith("projected_keys"))
    return state.state(name)


@pytest.mark.parametrize("shift", [0, 1000])
def test_the_cache_keeps_the_projection_of_keys_before_rotation(model, weights, shift):
    """Whatever the positions: a prompt of late rows, and rows that steps have written."""
    dense, ids = tiny("llama"), token_ids(190, 2)
    mask = torch.arange(190) >= torch.tensor([[37], [0]])
    with hooked(dense) as seen, torch.no_grad():
        dense(ids, attention_mask=mask.long(), position_ids=(mask.cumsum(1) - 1).clamp_min(0))
    _, cache = steps(model, shift)
    assert tsa.report(model).steps == {FIXED: 10 + 10 * (shift > 0)}
    state, index = kept_of(cache, 0), load_indexes(weights)[PATH.format(0)]  # deeper layers read less than dense ones
    want = seen[0, "k"][:, [0]] @ index.key.mT
    torch.testing.assert_close(state["index"][1, :, :190], want[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(state["index"][0, :, 37:190], want[0, :, 37:], rtol=1e-3, atol=1e-3)
    assert state["positions"][0, 0, 37:190].tolist() == [*range(shift, shift + 153)]
    assert state["counts"][0, 0, :11].tolist() == [0, 0, 11] + [16] * 8


def expected(weights, padding=37, total=190):
    """The logits of the last token, by masks that are made of the definition; one row after the other, not padded."""
    dense, found, found_shares = tiny("llama"), load_indexes(weights), []
    transformers.AttentionInterface.register("tsa_test_roles", attention_by_roles)
    dense.set_attn_implementation("tsa_test_roles")
    out = []
    for b, first in ((0, padding), (1, 0)):
        with hooked(dense) as seen, torch.no_grad():
            attention_by_roles.given = (seen, found, first, found_shares)
            out.append(dense(token_ids(total, 2)[b : b + 1, first:], use_cache=False).logits[:, -1])
    return torch.cat(out), found_shares


def attention_by_roles(module, q, k, v, mask, scaling=None, **kwargs):
    """Rows before the last: dense. The last: heads that look things up read the pages of their KV head, others a window."""
    seen, found, first, told = attention_by_roles.given
    n, length = module.layer_idx, k.shape[2]
    index = found[PATH.format(n)]
    page = (torch.arange(length) + first) // 16  # pages are of the padded row
    whole, read = (first + length) // 16, {}
    for number, h in enumerate(index.heads):
        z = (seen[n, "k"][0, h // 2] @ index.key[number].T) @ (index.query[number] @ seen[n, "q"][0, h, -1])
        mass = torch.stack([z[page == p].exp().sum() if p < whole else torch.zeros(()) for p in range(whole + 1)]).double()
        order, held = mass.argsort(descending=True), 0.0
        chosen = {whole} | ({whole - 1} if (first + length) % 16 == 0 else set())
        held = sum(mass[p] for p in chosen)
        for p in order.tolist():
            if held >= MASS * mass.sum():
                break
            held, chosen = held + mass[p] * (p not in chosen), chosen | {p}
        read.setdefault(h // 2, set()).update(chosen)
        told.append(len(chosen) / (whole + 1))
    near = (torch.arange(length) < 4) | (torch.arange(length) >= length - 20)
    visible = torch.ones(4, length, length, dtype=torch.bool).tril()
    for h in range(4):
        if h not in index.heads:
            visible[h, -1] = near
            continue
        pages = set(read[h // 2])
        if {2 * (h // 2), 2 * (h // 2) + 1} - {*index.heads}:  # a local head of the group: its pages are read besides
            pages |= {first // 16, first // 16 + 1, *(p for p in range(whole + 1) if p > (first + length - 1) // 16 - 3)}
        visible[h, -1] = torch.tensor([int(p) in pages for p in page])
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, visible[None], scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


def test_a_step_reads_what_the_projected_softmax_says(model, weights):
    want, shares = expected(weights)
    got, _ = steps(model, total=181 + 9, prompt=189)
    torch.testing.assert_close(got[-1], want, rtol=1e-3, atol=1e-3)
    assert min(shares) < 0.5  # it is not dense attention under another name
    sites = [site for site in tsa.report(model).sites if site.policy == "HeadSplit"]
    assert sites
    assert all(site.replaced for site in sites)


def test_generate_crop_and_reorder(model):
    """Rows that were taken back, copied or moved keep their projections; a cache that someone wrote to gets them anew."""
    ids = token_ids(60, 2)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    _, cache = steps(model)
    before = {name: x.clone() for name, x in kept_of(cache, 0).items()}
    cache.reorder_cache(torch.tensor([1, 0]))
    after = kept_of(cache, 0)
    torch.testing.assert_close(after["index"][0, :, :190], before["index"][1, :, :190])
    assert torch.equal(after["positions"][1, 0, :190], before["positions"][0, 0, :190])
    copied = kept_of(copy.deepcopy(cache), 0)
    for row, first in ((0, 0), (1, 37)):
        torch.testing.assert_close(copied["index"][row, :, first:190], after["index"][row, :, first:190], rtol=1e-3, atol=1e-3)


def test_the_index_is_a_submodule_that_moves_and_saves_with_the_model(model):
    names = [name for name in model.state_dict() if "tsa_index" in name]
    assert len(names) == 6
    moved = copy.deepcopy(dict(indexes(model))[PATH.format(0)]).to(torch.bfloat16)
    assert moved.query.dtype == moved.key.dtype == torch.bfloat16
    assert moved.frequencies.dtype == torch.float32
    assert moved.rotation == dict(indexes(model))[PATH.format(0)].rotation
    plain = tiny("llama")
    undo = attach_indexes(plain, {path: copy.deepcopy(index) for path, index in indexes(model)})
    exported = torch.export.export(plain, (), {"input_ids": token_ids(8), "use_cache": False})
    assert {*names} <= {*exported.state_dict}
    undo()
    assert not [*indexes(plain)]


def test_restore_takes_the_weights_back(weights):
    torch._dynamo.reset()
    model = tsa.transform(tiny("llama"), plan_of(weights))
    assert len([*indexes(model)]) == 2
    tsa.restore(model)
    assert not [*indexes(model)]


FRESH = """
import sys, torch, transformers
import tsa_compile as tsa
model = tsa.transform(transformers.LlamaForCausalLM.from_pretrained(sys.argv[1]).eval(), tsa.Plan.load(sys.argv[2]))
cache = transformers.DynamicCache(config=model.config)
name = "cache" if "cache" in model.forward.__code__.co_varnames else "past_key_values"
ids = torch.load(sys.argv[3])
with torch.no_grad():
    model(ids[:, :-1], **{name: cache})
    torch.save(model(ids[:, -1:], **{name: cache}).logits, sys.argv[3])
assert all(s.replaced for s in tsa.report(model).sites if s.policy == "HeadSplit")
"""


@pytest.mark.parametrize("process", ["this", pytest.param("other", marks=pytest.mark.slow)])
def test_a_fresh_model_loads_the_plan_and_its_weights(model, weights, tmp_path, monkeypatch, process):
    plain, plan = tiny("llama"), weights.parent / "plan.json"
    plain.save_pretrained(tmp_path)
    plan_of(weights).save(plan)
    assert json.loads(plan.read_text())["weights"] == "index.safetensors"
    ids, cache = token_ids(150), transformers.DynamicCache(config=model.config)
    torch.save(ids, tmp_path / "ids.pt")
    files = [*map(str, (tmp_path, plan, tmp_path / "ids.pt"))]
    if process == "this":
        monkeypatch.setattr(sys, "argv", ["-c", *files])
        exec(FRESH, {})
    else:
        root = Path(__file__).parents[2]
        done = subprocess.run([sys.executable, "-c", FRESH, *files], cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        model(ids[:, :-1], **{cache_name(model): cache})
        want = model(ids[:, -1:], **{cache_name(model): cache}).logits
    torch.testing.assert_close(torch.load(tmp_path / "ids.pt"), want)


def test_what_cannot_be_is_refused(weights, tmp_path):
    for changes, message in (
        ({"mass": 1}, r"HeadSplit.mass must be a number in \(0, 1\), or None, got 1"),
        ({"mass": 0.9, "keep": 0.5}, "HeadSplit takes keep or mass, got 0.5 and 0.9"),
    ):
        with pytest.raises(ValueError, match=message):
            tsa.HeadSplit((1,), **changes)
    with pytest.raises(ValueError, match=r"an index of heads \(1,\), and the plan says \(2,\)"):
        tsa.transform(tiny("llama"), plan_of(weights, ((2,), (0, 3))))
    with pytest.raises(ValueError, match=r"plan rule 0: HeadSplit.mass needs weights"):
        tsa.transform(tiny("llama"), dataclasses.replace(plan_of(weights), weights=None))
    (tmp_path / "none").write_text("{}")
    with pytest.raises(ValueError, match="none is no safetensors file"):
        tsa.transform(tiny("llama"), dataclasses.replace(plan_of(weights), weights=str(tmp_path / "none")))


def reasons(model, ids):
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :-1], **{cache_name(model): cache})
        model(ids[:, -1:], **{cache_name(model): cache})
    return {site.reason for site in tsa.report(model).sites if site.policy == "HeadSplit"}


def test_a_model_that_does_not_rotate_stays_dense_with_the_reason():
    torch._dynamo.reset()
    config = dict(n_embd=64, n_layer=1, n_head=4, vocab_size=128, n_positions=256, bos_token_id=1, eos_token_id=2)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
    weight = torch.randn(1, 4, 16)
    undo = attach_indexes(model, {"transformer.h.0.attn": HeadIndex((1,), 1, weight, weight, Rotation((1.0,), False, 1.0))})
    tsa.transform(model, tsa.Plan(prefill=tsa.Dense(), decode=tsa.HeadSplit((1,), mass=0.9)))
    (reason,) = reasons(model, token_ids(40))
    assert "queries before rotation are not known: no rotation by positions" in reason
    undo()


def test_another_rotation_than_the_learned_one_is_refused_and_one_that_changes_later_is_seen(weights):
    torch._dynamo.reset()
    other = tiny("llama")
    other.model.rotary_emb.inv_freq.mul_(0.5)
    (reason,) = reasons(tsa.transform(other, plan_of(weights)), token_ids(40))
    assert reason == "queries are rotated in another way than when the index was learned"
    torch._dynamo.reset()
    model = tsa.transform(tiny("llama"), plan_of(weights))
    assert reasons(model, token_ids(40)) == {""}
    model.model.rotary_emb.inv_freq.mul_(0.5)
    reasons(model, token_ids(40))
    assert any("inv_freq" in warning and "runs dense from now on" in warning for warning in tsa.report(model).warnings)
    assert attached(model) is not None
