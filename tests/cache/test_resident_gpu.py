"""`Resident` on a GPU: pinned host memory, a copy stream, recorded steps between choices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tsa_compile as tsa
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
    assert layer.host.keys.is_pinned()
    assert layer.host.values.is_pinned()


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
            assert torch.equal(rows, layer.host.keys[b, page])
