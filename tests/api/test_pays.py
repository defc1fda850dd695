"""`Plan(where="pays")`: below the measured length a site reads every key, and the report says so."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

import tsa_compile as tsa
from tests.api.tiny import tiny_llama, token_ids
from tsa_compile import pays
from tsa_compile.cache.names import cache_name
from tsa_compile.kernels.types import Operands
from tsa_compile.passes.site import AttentionSite, MaskFacts
from tsa_compile.policies.base import call
from tsa_compile.policies.why_dense import where_it_pays
from tsa_compile.recorder import record_kept

SPARSE = tsa.BlockSparse(0.99, window=1, last_dense=0, pool=16, sinks=0)
ROW = pays.Timing("9.0", "BlockSparse", 128, 32, 8, (1024, 2048, 4096), (1.0, 2.0, 3.0), (2.0, 1.0, 1.0), (0.5, 0.4, 0.3))


def qkv(q_len=600, k_len=600):
    return torch.randn(2, 4, q_len, 16), torch.randn(2, 2, k_len, 16), torch.randn(2, 2, k_len, 16)


def site_of(q, k, v, dense_below=0, mask=None):
    site = AttentionSite.of(Operands(q, k, v, mask), MaskFacts(True, padded=mask is not None))
    return dataclasses.replace(site, dense_below=dense_below)


def attend(site, policy=SPARSE):
    return policy.attend(call, site, policy.select(call, site, None))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("changes", [{}, {"share": "group"}, {"lookahead": False}], ids=str)
def test_one_operator_computes_what_three_do(changes, padded):
    policy = dataclasses.replace(SPARSE, **changes)
    q, k, v = qkv(500, 600)
    mask = torch.arange(600)[None] >= torch.tensor([[0], [130]]) if padded else None
    assert torch.equal(attend(site_of(q, k, v, 1, mask), policy), attend(site_of(q, k, v, 0, mask), policy))


def test_below_the_length_every_key_is_read():
    q, k, v = qkv()
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attend(site_of(q, k, v, 601)), dense, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(attend(site_of(q, k, v, 600)), dense, atol=1e-3)


def test_recorders_hear_of_it():
    q, k, v = qkv()
    with record_kept() as kept:
        for below in (0, 1, 601):
            attend(site_of(q, k, v, below))
    three, one, everything = kept.shares()
    assert three == one < everything == 1


def test_opcheck_and_errors():
    q, k, v = qkv()
    args = (q, k, v, None, 1, None, None, None, 0.3, [0.5], 128, 64, 4, 0)
    torch.library.opcheck(torch.ops.tsa.block_sparse_attention.default, args, {"dense_below": 7})
    with pytest.raises(ValueError, match="block_sparse_attention: alpha must be"):
        torch.ops.tsa.block_sparse_attention(*args[:9], [1.5], *args[10:])


def test_a_row_pays_from_where_it_stays_faster():
    assert ROW.pays_from == 2048
    assert dataclasses.replace(ROW, sparse_ms=(0.5, 3.0, 1.0)).pays_from == 4096
    assert dataclasses.replace(ROW, sparse_ms=(0.5, 1.0, 9.0)).pays_from is None


def test_a_file_of_rows(tmp_path, monkeypatch):
    file = tmp_path / "sub" / "pays.json"
    monkeypatch.setenv("TSA_PAYS", str(file))
    faster = dataclasses.replace(ROW, sparse_ms=(0.5, 1.0, 1.0))
    pays.write([ROW, dataclasses.replace(ROW, head_dim=64)], file)
    pays.write([faster], file)
    assert [row.head_dim for row in pays.read(file)] == [128, 64]
    assert pays.table()[0] == faster
    file.write_text(json.dumps({"rows": []}))
    pays.table.cache_clear()
    with pytest.raises(ValueError, match="no table of timings"):
        pays.table()
    pays.table.cache_clear()


def test_the_nearest_row_counts(monkeypatch):
    wide = dataclasses.replace(ROW, head_dim=256, sparse_ms=(9.0, 9.0, 9.0))
    few = dataclasses.replace(ROW, heads=8, sparse_ms=(9.0, 9.0, 1.0))
    monkeypatch.setattr(pays, "table", lambda: (ROW, wide, few))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    site = dataclasses.replace(site_of(*qkv()), device=torch.device("cuda"), head_dim=112, v_head_dim=112, heads=28)
    at = lambda **other: pays.pays_from("BlockSparse", dataclasses.replace(site, **other))  # noqa: E731
    assert (at(), at(heads=10), at(v_head_dim=256)) == (2048, 4096, None)
    assert at(device=torch.device("cpu")) == 0
    assert pays.pays_from("TokenSparse", site) == 0


def test_a_step_on_buffers_of_ours_is_not_made_dense(monkeypatch):
    monkeypatch.setattr(pays, "pays_from", lambda policy, site: None)
    prompt, step = (site_of(*qkv(q_len=n)) for n in (600, 1))
    plan = tsa.Plan(where="pays")
    assert plan.pays_from(SPARSE, prompt) is None
    assert plan.pays_from(tsa.Exact(), step) == 0


def test_sites_of_known_and_of_varying_length():
    site = site_of(*qkv())
    assert where_it_pays(SPARSE, site, 0) == (site, None)
    assert "dense below 601 tokens" in where_it_pays(SPARSE, site, 601)[1]
    assert "slower at every length" in where_it_pays(SPARSE, site, None)[1]
    assert where_it_pays(SPARSE, site, 600)[0].dense_below == 600


@pytest.mark.parametrize("front", ["trace", "interface"])
def test_a_model(monkeypatch, front):
    monkeypatch.setattr(pays, "pays_from", lambda policy, site: 300)
    torch.manual_seed(0)
    model, shares = tiny_llama(), []
    short, long = token_ids(200), token_ids(400)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 100  # keys differ in mass
        dense = model(short, use_cache=False).logits
        tsa.transform(model, tsa.Plan(SPARSE, where="pays"), front=front)
        torch.testing.assert_close(model(short, use_cache=False).logits, dense, rtol=1e-4, atol=1e-5)
        for ids in (short, long, short):
            with record_kept() as kept:
                model(ids, use_cache=False)
            shares.append(kept.shares())
    assert all(share == 1 for share in shares[0] + shares[2])
    assert len(shares[1]) == len(model.model.layers)
    assert max(shares[1]) < 1
    assert any("dense below 300 tokens" in site.reason for site in tsa.report(model).sites)


def test_a_short_prompt_is_the_models_own_call(monkeypatch):
    """After a first one has shown that no attention pays below the length; a cache with keys counts as long."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(pays, "pays_from", lambda policy, site: 300)
    model, ids = tiny_llama(), token_ids(200)
    with torch.no_grad():
        dense = model(ids, use_cache=False).logits
        tsa.transform(model, tsa.Plan(SPARSE, where="pays"))
        calls = []
        for call in (
            dict(input_ids=ids),
            dict(input_ids=ids),
            dict(input_ids=token_ids(310)),
            dict(inputs_embeds=torch.randn(1, 90, 64)),
        ):
            model(**call, use_cache=False)
            calls.append(tsa.report(model).calls)
        assert calls == [1, 1, 2, 2]
        assert torch.equal(model(ids, use_cache=False).logits, dense)
        cache = transformers.DynamicCache(config=model.config)
        name = cache_name(model)
        model(ids, **{name: cache})
        assert tsa.report(model).calls == 2
        model(token_ids(150), **{name: cache})
        assert tsa.report(model).calls == 3
