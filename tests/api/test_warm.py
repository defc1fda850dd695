"""A warm-up: later calls trace nothing, and (on a GPU) compile no kernel."""

from __future__ import annotations

import dataclasses
import functools
import random
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tsa_compile as tsa
from tests.api.tiny import Layers, tiny_llama, token_ids
from tsa_compile import pays, warm_up
from tsa_compile.kernels.common.compiled import compiled_kernels
from tsa_compile.warm_up import SHORT, batches


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def splits(processors: int, programs: int) -> int:
    """What chooses the kernel on a Hopper GPU (kernels/score/last_queries/hopper.py); 0: two launches."""
    return 0 if programs > processors else 1 << (max(1, min(processors // programs, 32)) - 1).bit_length()


@given(st.integers(1, 200), st.integers(1, 64), st.integers(1, 300))
def test_batches_meet_every_number_of_splits(processors, programs_a_row, most):
    met = {splits(processors, programs_a_row * batch) for batch in batches(most)}
    assert met == {splits(processors, programs_a_row * batch) for batch in range(1, most + 1)}
    assert len(batches(most)) <= 2 * most.bit_length()


def test_cells(monkeypatch):
    cells = functools.partial(warm_up.cells, device=torch.device("cuda", 0))
    assert cells(tsa.Plan(), 3, 100_000) == [(1, SHORT), (2, SHORT), (3, SHORT), (1, 8193)]
    assert {n for _, n in cells(tsa.Plan(prefill=tsa.TokenSparse()), 1, 100_000)} == {SHORT, 1152, 1153, 8193}
    rules = [("*", "prefill", tsa.TokenSparse(min_tokens=500))]
    assert {n for _, n in cells(tsa.Plan(rules=rules), 1, 600)} == {SHORT, 600}
    measured = pays.Timing("9.0", "BlockSparse", 128, 32, 8, (2048, 4096), (1.0, 1.0), (2.0, 0.5), (1.0, 1.0))
    monkeypatch.setattr(pays, "table", lambda: (measured, dataclasses.replace(measured, policy="TokenSparse")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert {n for _, n in cells(tsa.Plan(where="pays"), 1, 8000)} == {SHORT, 4095, 4096}
    assert {n for _, n in cells(tsa.Plan(), 1, 8000)} == {SHORT}


@pytest.mark.slow
def test_later_calls_trace_nothing():
    policy = tsa.TokenSparse(min_tokens=64, window=16)
    model = tsa.transform(tiny_llama(), tsa.Plan(prefill=policy, decode=tsa.Exact()), warm=4)
    before = tsa.report(model)
    assert before.graphs
    assert all(site.replaced for site in before.sites)
    with torch.no_grad():
        for batch, length in ((1, 50), (2, 131), (3, 77), (4, 90)):
            ids = token_ids(length, batch)
            model(input_ids=ids, logits_to_keep=1)
            padding = torch.ones_like(ids)
            padding[:, : batch - 1] = 0
            model.generate(ids * padding, attention_mask=padding, max_new_tokens=4, do_sample=False)
    after = tsa.report(model)
    assert after.graphs == before.graphs
    assert not after.untraced


def test_any_module_by_its_own_inputs():
    model, seen = tsa.transform(Layers().eval()), []

    def inputs(batch, tokens):
        seen.append((batch, tokens))
        return {"input_ids": token_ids(tokens, batch)}

    done = tsa.warm(model, max_batch=2, max_tokens=40, inputs=inputs)
    assert seen == [(1, 40), (2, 40)]
    assert (done.calls, done.kernels) == (2, 0)
    assert "0 kernels compiled or loaded, in 2 calls" in str(done)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"Layers was not transformed by tsa_compile\.transform"):
        tsa.warm(Layers())
    model = tsa.transform(Layers().eval())
    with pytest.raises(ValueError, match="max_batch must be an int >= 1, got 0"):
        tsa.warm(model, 0)
    with pytest.raises(ValueError, match=r"max_tokens must be an int >= 1, got 1\.5"):
        tsa.warm(model, max_tokens=1.5)
    with pytest.raises(ValueError, match="Layers takes no input_ids"):
        tsa.warm(model)


def test_the_counter_hears_triton_and_passes_it_on():
    knobs = pytest.importorskip("triton").knobs
    heard = []
    kernel = {"fn": types.SimpleNamespace(name="some_kernel"), "key": "k"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **told: heard.append(told))
        own = knobs.runtime.jit_post_compile_hook
        with compiled_kernels() as found:
            knobs.runtime.jit_post_compile_hook(**kernel)
        assert knobs.runtime.jit_post_compile_hook is own
    assert found == ["some_kernel"]
    assert heard == [kernel]


@pytest.mark.gpu
@pytest.mark.parametrize("policy", [tsa.BlockSparse(), tsa.TokenSparse()])
def test_no_kernel_is_compiled_after_a_warm_up(policy):
    sizes = dict(hidden_size=512, num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=16_384)
    model = tiny_llama(**sizes).to("cuda", torch.bfloat16)
    with compiled_kernels() as found:
        tsa.transform(model, tsa.Plan(prefill=policy, decode=tsa.Exact()), warm=8)
    assert found
    rng = random.Random(0)
    lengths = [rng.randrange(2, 3000) for _ in range(20)] + [rng.randrange(3000, 12_000) for _ in range(10)]
    with torch.no_grad(), compiled_kernels() as found:
        for length in lengths:
            for batch in (1, 2, 5, 8):
                ids = token_ids(length, batch).cuda()
                model(input_ids=ids, logits_to_keep=1)
                model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert found == []
