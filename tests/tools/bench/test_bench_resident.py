"""The benchmark of keys in host memory, on a CPU: what is brought is counted, and what it computes is right."""

from __future__ import annotations

import math

import pytest
import torch

from tests.cache.models import tiny
from tsa_compile.tools.bench import resident
from tsa_compile.tools.bench.resident import ResidentCase, bench_resident

pytest.importorskip("transformers")
CASE = ResidentCase(batch=2, length=900, keep=0.2, fetched=0.1, interval=8)
PAGE_BYTES = 2 * 16 * 2 * 16 * 4


@pytest.mark.slow
def test_every_number_is_there():
    row = bench_resident(tiny("llama"), CASE)
    assert row.choices == 2
    assert min(row.resident, row.fetching, row.on_device, row.first) > 0
    pages = math.ceil(0.1 * (900 // 16))
    assert pages * 2 * 2 * PAGE_BYTES <= row.fetching_bytes <= (pages + 1) * 2 * 2 * PAGE_BYTES
    assert 0 < row.resident_bytes < row.fetching_bytes
    assert "20% resident" in str(row)
    assert f"{row.fetching / row.resident:.2f} x" in str(row)


@pytest.mark.slow
def test_bringing_every_page_is_exact():
    """Five whole pages that are kept and the 51 others, each once: the logits are those of a set that has everything."""
    import tsa_compile as tsa

    found = []
    for make in (lambda policy: None, lambda policy: resident.FetchingSet(policy.keeping(), 51 / 56)):
        model = tiny("llama")
        policy = tsa.Resident(keep=1.0) if not found else tsa.Resident(pages=6, sinks=1, recent=5)
        with resident._transformed(model, policy):
            torch.manual_seed(1)
            cache = resident.filled(model, CASE, policy)
            brings = make(policy)
            for layer in cache.layers:
                layer.resident = brings or layer.resident
            torch.manual_seed(2)
            step = resident._stepper(model, cache, CASE)
            found.append(torch.cat([step().logits for _ in range(3)], 1))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
