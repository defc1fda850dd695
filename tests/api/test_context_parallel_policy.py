"""`transform(model, Plan(prefill=ContextParallel()))` on the ranks of a gloo group: the results of one process."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import tsa_compile as tsa
from tests.cache.models import cache_name, tiny, token_ids
from tests.cache.test_generate import generate
from tests.ranks import run_ranks
from tsa_compile import context_calls
from tsa_compile.kernels.common.zigzag import gathered
from tsa_compile.policies.base import from_dict

transformers = pytest.importorskip("transformers")
INNER = tsa.BlockSparse(alpha=0.6, window=64, last_dense=100)
SPREAD = tsa.ContextParallel(INNER)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """pytest keeps every message of a trace, which takes longer than the trace."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def padded(length: int, batch: int = 2) -> dict[str, Any]:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, : length // 4] = 0
    return dict(input_ids=token_ids(length, batch) * mask, attention_mask=mask)


def alike(found: list[Any], want: list[Any]) -> None:
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def one_prompt(policy: Any) -> list[Any]:
    """The last logits, and the cache's rows."""
    model = tsa.transform(tiny("llama", 1), tsa.Plan(prefill=policy))
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        logits = model(**padded(700), **{cache_name(model): cache}, logits_to_keep=1).logits
    rows = cache.layers[0]
    return [logits, rows.keys, rows.values, tsa.report(model).prompts, {s.policy for s in tsa.report(model).replaced}]


def test_a_prompt_is_that_of_one_process():
    *want, prompts, _ = one_prompt(INNER)
    assert not prompts
    for rank in run_ranks(2, one_prompt, SPREAD, limit=120):
        assert not isinstance(rank, str), rank
        *found, prompts, policies = rank
        alike(found, want)
        assert prompts == {"spread over 2 ranks": 1}
        assert policies == {"ContextParallel"}


def calls(policy: Any) -> list[Any]:
    """Logits of prompts with and without a cache and padding, of a second turn, of the last rows; the cache's rows."""
    model = tsa.transform(tiny("llama"), tsa.Plan(prefill=policy, decode=tsa.Exact()))
    name, cache = cache_name(model), transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        found = [
            model(token_ids(1100)).logits,
            model(token_ids(1200), use_cache=False, output_hidden_states=True).hidden_states[1],
            model(**padded(1050)).logits[:, 300:],
            model(token_ids(1025), **{name: cache}, logits_to_keep=3).logits,
            model(token_ids(1100, seed=1), **{name: cache}, logits_to_keep=300, return_dict=False)[0],
            model(token_ids(40, seed=2), **{name: cache}).logits,
            model(token_ids(1), **{name: cache}).logits,
        ]
    assert cache.get_seq_length() == 1025 + 1100 + 41
    found += [rows for layer in cache.layers for rows in layer.views()]
    report = tsa.report(model)
    return [*found, report.prompts, {s.policy for s in report.replaced}]


def after_a_failure() -> Any:
    """The first call of a model fails on all ranks, once its layers have their rows."""
    model = tsa.transform(tiny("llama"), tsa.Plan(prefill=SPREAD))
    cache = transformers.DynamicCache(config=model.config)
    call = dict(**padded(700), **{cache_name(model): cache}, logits_to_keep=1)
    with torch.no_grad():
        context_calls.gathered = lambda *args: 1 / 0  # in this process alone, which is a fork
        with pytest.raises(ZeroDivisionError):
            model(**call)
        assert cache.get_seq_length() == 0
        context_calls.gathered = gathered
        return [model(**call).logits, cache.get_seq_length()]


@pytest.mark.slow
def test_a_call_that_fails_leaves_the_cache_as_it_was():
    with torch.no_grad():
        want = tsa.transform(tiny("llama"), tsa.Plan(prefill=INNER))(**padded(700), logits_to_keep=1).logits
    for rank in run_ranks(2, after_a_failure, limit=200):
        assert not isinstance(rank, str), rank
        alike(rank[:1], [want])
        assert rank[1] == 700


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_results_are_those_of_one_process(ranks):
    *want, prompts, _ = calls(INNER)
    for rank in run_ranks(ranks, calls, SPREAD, limit=500):
        assert not isinstance(rank, str), rank
        *found, prompts, policies = rank
        alike(found, want)
        assert prompts == {f"spread over {ranks} ranks": 5, "whole on every rank": 1}
        assert policies >= {"ContextParallel", "Exact"}


DECODE = (tsa.Routed(), tsa.Routed(tsa.PageSparse(keep=0.4)), tsa.PageSparse(keep=0.4), tsa.Resident(keep=1.0), None)


def tokens(policy: Any, decode: tuple[Any, ...]) -> list[Any]:
    found = []
    for steps in decode:
        model = tsa.transform(tiny("llama"), tsa.Plan(prefill=policy, decode=steps))
        found.append(generate(model, **padded(600), max_new_tokens=6))
        found.append(generate(model, **padded(1200), max_new_tokens=4, prefill_chunk_size=600))
    return found


@pytest.mark.slow
def test_decode_goes_on_from_the_rows_of_all_ranks():
    want = tokens(INNER, (tsa.Exact(), tsa.PageSparse(keep=0.4)))
    want = want[:2] + 2 * want[2:] + 2 * want[:2]  # what each policy of DECODE is to give
    for rank in run_ranks(2, tokens, SPREAD, DECODE, limit=500):
        assert not isinstance(rank, str), rank
        assert all(torch.equal(a, b) for a, b in zip(rank, want, strict=True))


def refusals() -> list[str]:
    sliding, llama = tiny("mistral"), tiny("llama")
    plan, reused = tsa.Plan(prefill=SPREAD), ("model.layers.1.self_attn", "model.layers.0.self_attn", None, "prefill")
    long = llama.__class__(llama.config.__class__(**{**llama.config.to_dict(), "rope_parameters": LONG})).eval()
    found = []
    for model, given, chosen in (
        (sliding, {}, plan),
        (long, {}, plan),
        (llama, dict(labels=token_ids(600)), plan),
        (llama, dict(output_attentions=True), plan),
        (llama, {}, tsa.Plan(prefill=plan.prefill, rules=[("model.layers.0.*", "prefill", tsa.Dense())])),
        (
            llama,
            {},
            tsa.Plan(prefill=plan.prefill, reuse=[reused]),
        ),
        (llama, {cache_name(llama): transformers.StaticCache(config=llama.config, max_cache_len=700)}, plan),
        (llama, {}, tsa.Plan(prefill=tsa.ContextParallel(INNER, group="other"))),
    ):
        try:
            with torch.no_grad():
                tsa.transform(model, chosen)(token_ids(600), **given)
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
        tsa.restore(model)
    with pytest.raises(RuntimeError, match=r"call the model under torch\.no_grad"):
        tsa.transform(llama, plan)(token_ids(600))
    return found


LONG = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
REFUSED = (
    "RuntimeError: ContextParallel cannot use this cache, layers [0, 1] of DynamicCache: they do not keep all rows",
    "RuntimeError: ContextParallel is for models whose rows meet in full attention alone; LlamaForCausalLM has RoPE of kind",
    "ValueError: ContextParallel does not know how to cut labels [1, 600] of 600 tokens behind 0",
    "ValueError: ContextParallel: output_attentions is asked for",
    "ValueError: ContextParallel spreads a prompt over all layers: let every prefill policy be it, with one group",
    "ValueError: ContextParallel selects in each layer: Plan.reuse must be of other phases",
    "RuntimeError: ContextParallel cannot use this cache, layers [0, 1] of StaticCache: StaticCache is no DynamicCache",
    "GroupError: group 'other': this process is in no process group of that name; its groups are ['0']",
)


def test_what_cannot_be_spread_is_an_error():
    for rank in run_ranks(2, refusals):
        assert not isinstance(rank, str), rank
        assert [a[: len(b)] for a, b in zip(rank, REFUSED, strict=True)] == list(REFUSED)


def test_without_a_group_or_a_session_it_is_an_error():
    with torch.no_grad(), pytest.raises(RuntimeError, match="no process group: start with torchrun"):
        tsa.transform(tiny("llama", 1), SPREAD)(token_ids(600))
    with pytest.raises(Exception, match=r"ContextParallel needs what tsa_compile\.transform does"):
        torch.compile(torch.nn.Linear(1, 1), backend="tsa", options={"policy": SPREAD})(torch.ones(1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"inner": tsa.Dense()}, r"ContextParallel.inner must be a BlockSparse, got Dense\(\)"),
        ({"group": ""}, "ContextParallel.group must be the name of a process group, or None, got ''"),
    ],
)
def test_a_bad_value_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        tsa.ContextParallel(**fields)


def test_round_trip():
    for policy in (tsa.ContextParallel(), tsa.ContextParallel(INNER, group="3")):
        assert from_dict(policy.to_dict()) == policy
