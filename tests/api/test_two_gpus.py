"""Models on several GPUs of one host: by `device_map`, and on one that is not the current one."""

from __future__ import annotations

import pytest
import torch

import tsa_compile as tsa
from tests.api.tiny import tiny_llama, token_ids

pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
SPARSE = tsa.BlockSparse(0.5, window=64, last_dense=0, pool=16)


def llama(layers: int = 8):
    torch.manual_seed(0)
    return tiny_llama(num_hidden_layers=layers, max_position_embeddings=1024).cuda(0)


def spread(model):
    half = len(model.model.layers) // 2
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    places |= {f"model.layers.{n}": int(n >= half) for n in range(2 * half)}
    return accelerate.dispatch_model(model, places)


def padded(length: int = 700, padding: int = 90):
    mask = torch.ones(2, length, dtype=torch.long, device="cuda:0")
    mask[1, :padding] = 0
    return dict(input_ids=token_ids(length, 2).to("cuda:0"), attention_mask=mask, use_cache=False)


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits.to("cuda:0")[inputs["attention_mask"].bool()]


def test_a_device_map_replaces_the_sites_that_one_gpu_replaces():
    inputs = padded()
    one, two = tsa.transform(llama(), SPARSE), tsa.transform(spread(llama()), SPARSE)
    torch.testing.assert_close(logits(two, inputs), logits(one, inputs), rtol=1e-3, atol=1e-4)
    sites = [[(s.module, s.policy, s.replaced) for s in tsa.report(m).sites] for m in (one, two)]
    assert sites[0] == sites[1]
    assert len(tsa.report(two).replaced) == 8
    assert tsa.report(two).graphs <= 8


@pytest.mark.parametrize("decode", [tsa.Exact(), tsa.PageSparse(keep=0.5)], ids=["exact", "pages"])
def test_decode_on_a_gpu_that_is_not_the_current_one(decode):
    inputs = {name: x for name, x in padded().items() if name != "use_cache"}
    results = []
    for device in ("cuda:0", "cuda:1"):
        model = tsa.transform(llama(2).to(device), tsa.Plan(SPARSE, decode=decode))
        there = {name: x.to(device) for name, x in inputs.items()}
        results.append(model.generate(**there, max_new_tokens=12, do_sample=False).cpu())
        assert torch.cuda.current_device() == 0
        assert tsa.report(model).steps.get("replayed", 0) > 0
    assert torch.equal(*results)
