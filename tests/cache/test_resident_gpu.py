"""`Resident` on a GPU: pinned host memory, a copy stream, recorded steps between choices."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

import tsa_compile as tsa
from tests.cache import models
from tests.cache.models import cache_name, tiny, token_ids
from tests.cache.test_generate import generate
from tsa_compile.steps import FIXED, REPLAYED

pytestmark = pytest.mark.gpu


def run(**fields: Any) -> tuple[torch.Tensor, Any, Any, torch.Tensor]:
    transformers = pytest.importorskip("transformers")
    call = dict(input_ids=token_ids(1500, 2).cuda(), max_new_tokens=60, output_logits=True, return_dict_in_generate=True)
    dense = torch.stack(generate(tiny("llama").cuda(), **call).logits)
    model = tsa.transform(tiny("llama").cuda(), tsa.Plan(prefill=tsa.Dense(), decode=tsa.Resident(**fields)))
    cache = transformers.DynamicCache(config=model.config)
    logits = torch.stack(generate(model, **call, **{cache_name(model): cache}).logits)
    return logits, cache.layers[0], tsa.report(model), dense


@pytest.mark.parametrize("fields", [dict(pages=12, strict=True), dict(keep=1.0)])
def test_everything_read_is_dense_attention(fields):
    logits, layer, _, dense = run(interval=8, **fields)
    torch.testing.assert_close(logits, dense, rtol=1e-3, atol=1e-4)
    assert all(x.is_pinned() for segment in layer.host.segments for x in segment[1:])


def test_steps_between_choices_are_replayed():
    """Of 59: the first, one in 16 from there on, and those that make a recording run as they are."""
    _, layer, report, _ = run(pages=12, interval=16)
    assert layer.resident.counts.refreshes == 4
    assert report.steps[REPLAYED] >= 45
    assert report.steps[FIXED] + report.steps[REPLAYED] == 59
    torch.cuda.synchronize()
    layer.resident._arrive()
    for b, places in enumerate(layer.resident.slots):
        for page, slot in places.items():
            rows = layer.buffers.keys[b, :, slot * 16 : slot * 16 + 16].cpu()
            assert torch.equal(rows, layer.host.page(page)[0][b])


LONG = 8192  # tokens, of 64 KiB of keys and values each: 512 MiB in all
ALLOWED = 400 << 20  # bytes on the device beyond the weights


def many_layers() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {**models.TINY, "num_hidden_layers": 32, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": LONG}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).cuda().eval()


def test_a_prompt_that_the_device_has_no_room_for():
    """In parts it runs through, exact, where the same cache on the device has no memory."""
    call = dict(input_ids=token_ids(LONG).cuda(), max_new_tokens=4, prefill_chunk_size=1024)
    want = generate(many_layers(), **call)
    found = {}
    for name, decode in (("resident", tsa.Resident(keep=0.13, strict=True)), ("on the device", tsa.Exact())):
        model = tsa.transform(many_layers(), tsa.Plan(prefill=tsa.BlockSparse(alpha=0), decode=decode))
        generate(model, input_ids=token_ids(2048).cuda(), max_new_tokens=4, prefill_chunk_size=1024)  # compiles
        gc.collect()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + ALLOWED) / total)
        try:
            found[name] = generate(model, **call)
        except torch.OutOfMemoryError:
            found[name] = None
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert found["on the device"] is None
    assert found["resident"] is not None
    assert torch.equal(found["resident"], want)
