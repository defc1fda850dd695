"""Sessions: plans switched without a trace, graphs for several layers, threads, hooks, limits, and what others do to a model."""

from __future__ import annotations

import copy
import gc
import logging
import threading
import time
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tsa_compile as tsa
from tests.api.tiny import KEEP_ALL, SPARSE, tiny_llama, token_ids
from tsa_compile import session as sessions
from tsa_compile.dynamo import settings
from tsa_compile.recorder import record_kept
from tsa_compile.session import Session


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Layer(nn.Module):
    def __init__(self, index: int, guarded: bool) -> None:
        super().__init__()
        self.self_attn, self.index, self.guarded = Attention(), index, guarded

    def forward(self, x, store):
        torch._dynamo.graph_break()
        out = x + self.self_attn(x)
        if self.guarded:
            store[self.index] = out  # one graph for each layer
        return out


class Stack(nn.Module):
    """Layers that Dynamo compiles one by one, and by one function."""

    def __init__(self, layers: int, guarded: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(i, guarded) for i in range(layers))

    def forward(self, x):
        store = [None] * len(self.layers)
        for layer in self.layers:
            x = layer(x, store)
        return x


@torch.no_grad()
def kept(model, x):
    """(output, modules whose selections ran) of one call."""
    with record_kept(model) as tokens:
        out = model(x)
    return out, [module for module, _ in tokens.by_module()]


def attn(*layers):
    return [f"layers.{n}.self_attn" for n in layers]


def test_a_plan_is_switched_without_a_trace():
    model, ids = tiny_llama(num_hidden_layers=2), token_ids(60)
    session = Session(model, tsa.Plan(prefill=SPARSE))
    with torch.no_grad():
        sparse, dense = session(input_ids=ids).logits, model(input_ids=ids).logits
        session.plan = tsa.Plan(prefill=KEEP_ALL)
        torch.testing.assert_close(session(input_ids=ids).logits, dense, atol=1e-5, rtol=1e-5)
        session.plan = tsa.Plan(prefill=tsa.Dense(), rules=[("*.1.*", "prefill", SPARSE)])
        one = session(input_ids=ids).logits
        assert [s.replaced for s in session.report.sites] == [False, True]
        session.plan = tsa.Plan(prefill=SPARSE)
        assert torch.equal(session(input_ids=ids).logits, sparse)
    assert not torch.equal(one, sparse)
    assert session.report.graphs == 1
    tsa.transform(model, tsa.Plan(prefill=tsa.Dense(), rules=[("*.1.*", "prefill", SPARSE)]))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, one)


def test_a_plan_for_a_dense_graph_of_all_lengths_needs_no_other():
    """What a policy puts in assumes nothing of the sizes: Dynamo took its guards before."""
    torch._dynamo.reset()
    session = Session(tiny_llama(), tsa.Plan(prefill=tsa.Dense()))
    blocks = tsa.BlockSparse(0.05, last_dense=0)
    with torch.no_grad():
        for length in (300, 420, 4200):
            session(input_ids=token_ids(length, 2), use_cache=False)
        for policy in (tsa.TokenSparse(), blocks, tsa.TokenSparse(inner=blocks)):
            session.plan = tsa.Plan(prefill=policy)
            session(input_ids=token_ids(433, 2), use_cache=False)
            assert not session.report.dense, session.report
    assert session.report.graphs == 1


@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_graph_that_serves_all_layers_asks_the_plan_for_each(compiler):
    model, x = Stack(4).eval(), torch.randn(1, 60, 32)
    dense = model(x).detach()
    for chosen in ((0,), (2,), (1, 3)):
        torch._dynamo.reset()
        plan = tsa.Plan(prefill=tsa.Dense(), rules=[(f"layers.{n}.*", "prefill", SPARSE) for n in chosen])
        tsa.transform(model, plan, compiler=compiler)
        out, ran = kept(model, x)
        assert ran == attn(*chosen)
        report = tsa.report(model)
        assert [s.module for s in report.sites] == attn(*range(4))
        assert [s.module for s in report.replaced] == attn(*chosen)
        assert (out - dense).abs().max() > 1e-4
        tsa.restore(model)
    tsa.transform(model, tsa.Plan(prefill=tsa.Dense(), rules=[("layers.2.*", "prefill", KEEP_ALL)]), compiler=compiler)
    torch.testing.assert_close(kept(model, x)[0], dense, atol=1e-5, rtol=1e-5)


def test_a_calibrated_plan_holds_under_graph_breaks():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.stack = nn.Embedding(128, 32), Stack(4)

        def forward(self, input_ids):
            return self.stack(3 * self.embed(input_ids))

    torch.manual_seed(0)
    base = tsa.TokenSparse(window=8, pool=3, min_tokens=8)
    plan = tsa.calibrate(Model().eval(), [token_ids(100)], "sparsity>=0.1", policy=base, coverages=(0.3,), last=8, progress=False)
    assert plan.notes["sparse layers"].endswith("of 4")


def test_a_layer_that_cannot_be_told_stays_dense():
    model, x = Stack(3).eval(), torch.randn(1, 60, 32)
    model.layers[2].self_attn.qkv = model.layers[1].self_attn.qkv
    tsa.transform(model, tsa.Plan(prefill=SPARSE, rules=[("layers.1.*", "prefill", tsa.Dense())]))
    assert kept(model, x)[1] == attn(0)
    assert [("do not tell" in s.reason, s.replaced) for s in tsa.report(model).sites] == [(False, True), (True, False)]


@pytest.mark.slow
@pytest.mark.parametrize("layers", [72])
def test_there_is_room_for_all_layers(layers):
    model, x = Stack(layers, guarded=True).eval(), torch.randn(1, 30, 32)
    tsa.transform(model, SPARSE)
    assert kept(model, x)[1] == attn(*range(layers))
    assert not tsa.report(model).warnings


def test_what_dynamo_skips_is_counted_and_said(monkeypatch, caplog):
    class Named(nn.Module):
        def forward(self, q, size):
            return F.scaled_dot_product_attention(q, q, q, is_causal=True) * len(size)

    monkeypatch.setattr(sessions, "room", lambda model: 9)
    model, q = tsa.transform(Named(), SPARSE), torch.randn(1, 2, 40, 16)
    with torch.no_grad():
        for n in range(14):
            model(q, f"{n}x{n}")
    report = tsa.report(model)
    assert (report.calls, report.untraced) == (14, 5)
    assert any("hit config.recompile_limit (9)" in w for w in report.warnings)
    assert "5 of 14 calls ran dense" in report.summary()
    assert "hit config.recompile_limit (9)" in caplog.text


def test_a_model_that_was_called_is_told_from_one_that_was_not():
    class Odd(nn.Module):
        @torch.compiler.disable
        def forward(self, x):
            return x

    model = tsa.transform(Odd())
    assert "nothing was traced yet" in tsa.report(model).summary()
    model(torch.ones(2))
    assert "called 1 time(s), but nothing was traced" in tsa.report(model).summary()


def test_hooks_added_later_are_obeyed():
    model, ids = tiny_llama(), token_ids(40)
    tsa.transform(model, KEEP_ALL)
    before = torch._dynamo.config.skip_nnmodule_hook_guards
    seen = []
    with torch.no_grad():
        model(input_ids=ids)
        model.register_forward_hook(lambda m, a, o: seen.append("root"))
        model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda m, a, o: o * 0)
        got = model(input_ids=ids).logits
        assert seen == ["root"]
        tsa.restore(model)
        torch.testing.assert_close(got, model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    assert torch._dynamo.config.skip_nnmodule_hook_guards == before
    assert torch._dynamo.config.recompile_limit == 8


@pytest.mark.parametrize(("threads", "seconds"), [(4, 2), pytest.param(8, 60, marks=pytest.mark.slow)])
def test_calls_are_answered_while_others_compile(threads, seconds):
    """Also a cold model from several threads; results are those of one thread."""
    models = [tsa.transform(tiny_llama(), KEEP_ALL) for _ in range(2)]
    ids, errors, served, end = token_ids(40), [], [], time.monotonic() + seconds

    def serve(number):
        results = []
        while time.monotonic() < end or not results:
            try:
                with torch.no_grad():
                    results.append(models[number % 2](input_ids=ids).logits)
            except Exception as error:  # every one counts
                errors.append(error)
                return
        served.append((number, results))

    workers = [threading.Thread(target=serve, args=(n,)) for n in range(threads)]
    for t in workers:
        t.start()
    while any(t.is_alive() for t in workers):
        torch.compile(nn.Sequential(*[nn.Linear(8, 8) for _ in range(40)]), backend="eager")(torch.randn(2, 8))
    for t in workers:
        t.join()
    assert not errors
    with torch.no_grad():
        expected = [model(input_ids=ids).logits for model in models]
    assert len(served) == threads
    for number, results in served:
        for result in results:
            torch.testing.assert_close(result, expected[number % 2])
    assert torch._dynamo.config.recompile_limit == 8


def test_every_thread_gets_its_configuration_back():
    """Whichever call ends first. Before torch 2.13 there is one configuration, which the last call puts back."""
    config, seen, entered, left = torch._dynamo.config, {}, threading.Barrier(2), threading.Event()

    def first():
        with settings.ours(64):
            entered.wait()
            seen["inside"] = config.recompile_limit
        left.set()

    def both(name, work):
        work()
        done.wait()  # both calls are over
        seen[name] = config.recompile_limit, config.skip_nnmodule_hook_guards

    def second():
        with settings.ours(80):
            entered.wait()
            left.wait()

    done, before = threading.Barrier(2), (config.recompile_limit, config.skip_nnmodule_hook_guards)
    threads = [threading.Thread(target=both, args=pair) for pair in (("first", first), ("second", second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen.pop("inside") >= 64
    assert seen == {"first": before, "second": before}
    assert (config.recompile_limit, config.skip_nnmodule_hook_guards) == before


def test_recordings_see_their_own_model_and_thread():
    one, other, ids = tsa.transform(tiny_llama(), SPARSE), tsa.transform(tiny_llama(), SPARSE), token_ids(60)
    with torch.no_grad():
        one(input_ids=ids), other(input_ids=ids)
        with record_kept(one) as kept_tokens, record_kept() as all_tokens:
            other(input_ids=ids)
            one(input_ids=ids)
            thread = threading.Thread(target=lambda: one(input_ids=ids))
            thread.start()
            thread.join()
    assert [m for m, _ in kept_tokens.by_module()] == ["model.layers.0.self_attn"]
    assert len(all_tokens.shares()) == 2


def test_a_compile_over_ours_is_noticed(caplog):
    model = tsa.transform(tiny_llama(), SPARSE)
    model.compile(backend="eager")
    theirs = model._compiled_call_impl
    with pytest.raises(RuntimeError, match=r"something else .* has taken its calls since"):
        tsa.report(model)
    with pytest.raises(RuntimeError, match="was transformed by tsa_compile"), torch.no_grad():
        model(input_ids=token_ids(40))
    assert tsa.restore(model) is model
    assert model._compiled_call_impl is theirs
    with torch.no_grad():
        model(input_ids=token_ids(40))
    assert "compiled by something else" in caplog.text
    with pytest.raises(ValueError, match="was not transformed"):
        tsa.restore(model)


@pytest.mark.parametrize("end", [tsa.restore, lambda model: None], ids=["restore", "the model goes"])
def test_graphs_and_weights_are_freed(end):
    model = tsa.transform(tiny_llama(), SPARSE)
    with torch.no_grad():
        model(input_ids=token_ids(40))
    (graph,) = sessions.attached(model).backend.graphs
    gone = [weakref.ref(x) for x in (model, model.lm_head.weight, graph.gm, graph.form(graph._backend.plan).gm)]
    del graph
    end(model)
    del model
    gc.collect()
    gc.collect()  # the first ends the session, which lets go of its graphs
    assert [x() for x in gone] == [None] * 4


def test_the_backend_reports(caplog):
    def attention(q, mask):
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    q = torch.randn(1, 2, 40, 16)
    compiled = torch.compile(attention, backend="tsa", options={"compiler": "eager"})
    with pytest.raises(ValueError, match="has no graph of"):
        tsa.report(compiled)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        compiled(q, torch.rand(40, 40) > 0.5)
    assert "none of the 1 attention sites of a graph is replaced" in caplog.text
    for target in (compiled, attention):
        assert len(tsa.report(target).dense) == 1
    model = tiny_llama()
    compiled = torch.compile(model, backend="tsa", options={"compiler": "eager", "coverage": 0.05})
    with torch.no_grad():
        compiled(input_ids=token_ids(40))
    for target in (compiled, model):
        report = tsa.report(target)
        assert len(report.replaced) == 1
        assert report.graphs == 1


class Causal(nn.Module):
    def forward(self, q):
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)


class Larger(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, q):
        return self.inner(q) + 1


TRACES = {
    "compile": lambda m, q: torch.compile(m, backend="eager")(q),
    "compile a larger model": lambda m, q: torch.compile(Larger(m), backend="eager")(q),
    "export": lambda m, q: torch.export.export(m, (q,)),
    "export, strict": lambda m, q: torch.export.export(m, (q,), strict=True),
    "onnx": lambda m, q: torch.onnx.export(m, (q,), dynamo=True, verbose=False),
    "jit": lambda m, q: torch.jit.trace(m, (q,)),
}


@pytest.mark.parametrize("how", TRACES)
def test_a_trace_of_a_transformed_model_is_refused(how):
    model, q = tsa.transform(Causal(), SPARSE), torch.randn(1, 2, 40, 16)
    with torch.no_grad():
        model(q)
        with pytest.raises(Exception, match="was transformed by tsa_compile"):
            TRACES[how](model, q)
        torch._dynamo.reset()
        assert kept(model, q)[1] == [""]
        TRACES[how](copy.deepcopy(model), q)
        TRACES[how](tsa.restore(model), q)
