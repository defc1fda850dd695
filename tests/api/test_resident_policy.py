"""`transform(model, Plan(decode=Resident(...)))`: exact where it reads everything, and honest about what it leaves out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import tsa_compile as tsa
from tests.cache.models import cache_name, tiny, token_ids
from tests.cache.test_generate import MODES, generate
from tsa_compile.cache import host_pages
from tsa_compile.policies.base import from_dict
from tsa_compile.session import attached
from tsa_compile.steps import FIXED

transformers = pytest.importorskip("transformers")
KEYS = torch.ones(2, 1100, dtype=torch.long)  # 69 pages: the smallest pool has 64
KEYS[0, :37] = 0
LONG = dict(input_ids=token_ids(1100, 2) * KEYS, attention_mask=KEYS, max_new_tokens=20)
LOGITS = dict(**LONG, output_logits=True, return_dict_in_generate=True)


def plan(**fields: Any) -> tsa.Plan:
    return tsa.Plan(prefill=tsa.Dense(), decode=tsa.Resident(**fields))


def model_of(layers: int = 1) -> Any:
    model = tiny("llama", layers)
    model.config.max_position_embeddings = 4096
    return model


@pytest.fixture
def quiet() -> Iterator[None]:
    """pytest keeps every message of a trace, which takes longer than the trace."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("quiet")
def test_tokens_of_every_page_and_of_a_few(monkeypatch):
    dense = torch.stack(generate(model_of(), **LOGITS).logits)
    model = tsa.transform(model_of(), plan(pages=8, interval=8, strict=True))

    def run(**fields: Any) -> tuple[torch.Tensor, Any]:
        attached(model).plan = plan(**fields)
        cache = transformers.DynamicCache(config=model.config)
        logits = torch.stack(generate(model, **LOGITS, **{cache_name(model): cache}).logits)
        return logits, cache.layers[0]

    strict, layer = run(pages=8, interval=8, strict=True)
    torch.testing.assert_close(strict, dense, rtol=1e-4, atol=1e-5)
    assert layer.length < layer.count() == 1119
    every, layer = run(keep=1.0, interval=8)
    torch.testing.assert_close(every, dense, rtol=1e-4, atol=1e-5)
    few, layer = run(pages=8, interval=8, sample=2)
    assert layer.length < layer.count()
    torch.testing.assert_close(few[:2], dense[:2], rtol=1e-4, atol=1e-5)  # of the prompt; and the first step reads everything
    assert not torch.allclose(few, dense, rtol=1e-3, atol=1e-3)
    counts = layer.resident.counts
    assert (counts.steps, counts.refreshes, counts.sampled) == (19, 3, 10)
    assert 0.1 < counts.lost_mass < 1  # of a random model, whose attention is nearly even
    report = tsa.report(model)
    assert report.steps == {FIXED: 3 * 19}
    assert not report.warnings
    attached(model).plan = plan(pages=8, interval=8, strict=True)
    logits = after_short_memory(model, monkeypatch)
    torch.testing.assert_close(logits, dense[1], rtol=1e-4, atol=1e-5)


def after_short_memory(model: Any, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The host has no memory for a prompt: an error that says so, and with memory the same cache goes on."""
    cache = transformers.DynamicCache(config=model.config)
    given = {"attention_mask": KEYS, "position_ids": (KEYS.cumsum(1) - 1).clamp_min(0), cache_name(model): cache}
    with torch.no_grad(), monkeypatch.context() as short:
        short.setattr(host_pages, "available_memory", lambda: 1000)
        with pytest.raises(host_pages.HostMemoryError, match=r"GiB of host memory for 68 more pages of a layer, batch 2"):
            model(LONG["input_ids"], **given)
    assert cache.get_seq_length() == 1100
    first = generate(model_of(), **{**LONG, "max_new_tokens": 1})[:, -1:]
    mask = torch.nn.functional.pad(KEYS, (0, 1), value=1)
    with torch.no_grad():
        step = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1, cache_name(model): cache}
        return model(first, **step).logits[:, -1]


def test_outside_of_a_session_it_is_an_error():
    with pytest.raises(Exception, match="Resident needs what tsa_compile"):
        torch.compile(torch.nn.Linear(1, 1), backend="tsa", options={"policy": plan(pages=8)})(torch.ones(1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of keep and pages, got None and None"),
        ({"keep": 0.1, "pages": 3}, "exactly one of keep and pages, got 0.1 and 3"),
        ({"keep": 1.5}, r"Resident.keep must be a number in \(0, 1\], got 1.5"),
        ({"pages": 0}, "Resident.pages must be an int >= 1, got 0"),
        ({"pages": 8, "interval": 0}, "Resident.interval must be an int >= 1, got 0"),
        ({"pages": 8, "layers": ()}, r"Resident.layers must be layer numbers, at least one, or None, got \(\)"),
        ({"pages": 8, "ensemble": "or"}, r"Resident.ensemble must be one of \('max', 'mean'\), got 'or'"),
        ({"pages": 8, "strict": 1}, "Resident.strict must be True or False, got 1"),
        ({"pages": 8, "index": "basis"}, r"Resident.index must be one of \('mean', 'learned'\), got 'basis'"),
        ({"threshold": 1.0}, r"Resident.threshold must be a number in \(0, 1\), or None, got 1.0"),
        ({"threshold": 0.5}, "Resident.threshold is of scores of a learned index: give index='learned'"),
    ],
)
def test_a_bad_value_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        tsa.Resident(**fields)


def test_round_trip():
    learned = tsa.Resident(layers=(1, 2), index="learned", threshold=0.5)
    for policy in (tsa.Resident(0.13), tsa.Resident(pages=8, layers=[0, 3], strict=True), learned):
        assert from_dict(policy.to_dict()) == policy


@pytest.mark.slow
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "static"])
def test_modes(mode):
    """Strict, with fewer pages on the device than the prompt has."""
    prompt = token_ids(20).repeat(1, 10) if mode == "prompt lookup" else token_ids(200, 2)
    want = generate(model_of(2), input_ids=prompt, **MODES[mode])
    model = tsa.transform(model_of(2), plan(pages=5, interval=4, strict=True))
    assert torch.equal(generate(model, input_ids=prompt, **MODES[mode]), want)
