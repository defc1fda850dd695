"""LLaDA 2 and Fast-dLLM v2: tiny random checkpoints under their names, against models and loops written from their interface."""

from __future__ import annotations

import json

import pytest
import torch

import tsa_compile as tsa
from tests.generate.published_models import FAST, LLADA2, MASK, STOP, FastDllm, Llada2, fast_generate, llada2_generate
from tsa_compile.generate.block_cache import BlockCache

pytest.importorskip("transformers")
pytest.importorskip("safetensors")
from safetensors.torch import save_file

from tsa_compile.generate import checkpoints, families


def written(folder, model, config):
    save_file({name: x.contiguous() for name, x in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return checkpoints.load(folder, torch.float32, "cpu")


@pytest.fixture(scope="module")
def llada2(tmp_path_factory):
    torch.manual_seed(0)
    model = Llada2().eval()
    return model, written(tmp_path_factory.mktemp("llada2"), model, LLADA2)


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    torch.manual_seed(1)
    model = FastDllm().eval()
    return model, written(tmp_path_factory.mktemp("fast"), model, FAST)


def logits_by_blocks(model, ids, block, rows):
    cache, parts = BlockCache(tsa.Plan(), block, ids.shape[1]), []
    for start in range(0, ids.shape[1], rows):
        cache.begin("prefill", rows)
        parts.append(model(ids[:, start : start + rows], cache.positions(rows, ids.device), cache))
        cache.commit(rows)
    return torch.cat(parts, 1)


def test_llada2_gives_the_logits_of_its_own_model(llada2):
    model, found = llada2
    ids = torch.randint(STOP, (2, 24))
    mask = torch.ones(6, 6).tril().log().repeat_interleave(4, 0).repeat_interleave(4, 1)
    with torch.no_grad():
        torch.testing.assert_close(logits_by_blocks(found.model, ids, 4, 8), model(ids, mask), rtol=1e-4, atol=1e-4)


def test_fast_dllm_gives_the_logits_of_its_own_model(fast):
    model, found = fast
    ids = torch.randint(STOP, (2, 24))
    with torch.no_grad():
        first, past = model(ids[:, :16], None, True, 8)
        want = torch.cat([first, model(ids[:, 16:], past, False, 8)[0]], 1)
        torch.testing.assert_close(logits_by_blocks(found.model, ids, 8, 8), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("prompt", "steps", "threshold"), [(8, 4, 0.95), (11, 4, 0.1), (3, 2, 0.3), (8, 3, 0.999), (11, 2, 0.6)])
def test_llada2_generates_what_its_own_loop_does(llada2, prompt, steps, threshold):
    model, found = llada2
    ids = torch.randint(STOP, (1, prompt))
    with torch.no_grad():
        want, calls = llada2_generate(model, ids, 13, 4, steps, threshold)
    done = found.diffuse(ids, 13, block=4, steps=steps, threshold=threshold, stop_id=STOP)
    assert torch.equal(done.ids, want)
    assert sum(b.forwards for b in done.blocks) == calls


@pytest.mark.parametrize(
    ("prompt", "small", "threshold"), [(16, 4, 0.9), (19, 4, 0.05), (5, 2, 0.1), (16, 8, 0.05), (5, 4, 0.3), (19, 2, 1.0)]
)
def test_fast_dllm_generates_what_its_own_loop_does(fast, prompt, small, threshold):
    model, found = fast
    ids = torch.randint(STOP, (1, prompt))
    blocks = 3
    with torch.no_grad():
        want, calls = fast_generate(model, ids, blocks, 8, small, threshold)
    new = (prompt // 8 + blocks) * 8 - prompt
    done = found.diffuse(ids, new, part=small, threshold=threshold, stop_id=STOP, mask_id=MASK)
    assert torch.equal(done.ids, want[:, : prompt + new])
    assert sum(b.forwards for b in done.blocks) == calls


def test_sampling_is_as_published(llada2, fast):
    assert llada2[1].sampling == families.Sampling(MASK, 32, threshold=0.95, stop_id=156892)
    assert fast[1].sampling == families.Sampling(151665, 8, threshold=0.9, part=8, shifted=True, stop_id=151645)
    assert fast[1].model.model.config.model_type == "qwen2"
    assert llada2[1].model.model.config.model_type == "glm4_moe"


@pytest.mark.parametrize("name", ["llada2", "fast"])
def test_remembered_keys_in_both(name, request):
    _, found = request.getfixturevalue(name)
    ids, run = torch.randint(STOP, (2, 24)), dict(block=8, part=4, threshold=None, stop_id=None, mask_id=MASK)
    dense = found.diffuse(ids, 16, **run)
    assert not (dense.ids == MASK).any()
    assert torch.equal(found.diffuse(ids, 16, plan=tsa.Remembered("denoise_first", keys=512), **run).ids, dense.ids)
    some = found.diffuse(ids, 16, plan=tsa.Remembered("denoise_first", keys=4), **run)
    assert some.sparse_share == pytest.approx(1 / 3)
    assert some.never_bit == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LLADA2 | {"score_function": "softmax"}, "'llada2_moe' with {'score_function': 'softmax'} is not taken"),
        (FAST | {"use_sliding_window": True}, "'Fast_dLLM_Qwen' with {'use_sliding_window': True} is not taken"),
    ],
)
def test_what_is_not_taken_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        families.described(config)


def test_weights_that_have_no_place_are_an_error(tmp_path):
    weights = Llada2().state_dict()
    weights["model.layers.0.attention.dense.bias"] = torch.zeros(32)
    save_file({name: x.contiguous() for name, x in weights.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(LLADA2))
    with pytest.raises(ValueError, match=r"left over \['model\.layers\.0\.self_attn\.o_proj\.bias'\]"):
        checkpoints.load(tmp_path, torch.float32, "cpu")
