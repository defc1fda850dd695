"""`transform(model, Plan(decode=Routed()))` on the ranks of a gloo group: the tokens of one process, from the pages of each."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tsa_compile as tsa
from tests.cache.models import cache_name, tiny, token_ids
from tests.cache.test_generate import MODES, generate
from tests.ranks import run_ranks
from tsa_compile.cache.route_cost import Link
from tsa_compile.kernels.common.spread import rows_held
from tsa_compile.policies.base import from_dict
from tsa_compile.session import attached
from tsa_compile.steps import FIXED

transformers = pytest.importorskip("transformers")
SPARSE = tsa.PageSparse(keep=0.4, recent=1)
SLOW = Link(probe=1e-6, bandwidth=1e9, attend=1e-9, merge=1e-6, splice=1.0)  # a second for each key that comes
FAST = Link(probe=1e-3, bandwidth=1e12, attend=1e-9, merge=1e-6, splice=0.0)  # each exchange takes a millisecond
KEYS = torch.ones(2, 200, dtype=torch.long)
KEYS[0, :37] = 0  # padding: two pages and a part
LONG = dict(input_ids=token_ids(200, 2) * KEYS, attention_mask=KEYS, max_new_tokens=8)
LOGITS = dict(**LONG, output_logits=True, return_dict_in_generate=True)


def transformed(policy: Any, layers: int = 1) -> Any:
    return tsa.transform(tiny("llama", layers), tsa.Plan(prefill=tsa.Dense(), decode=policy))


def routed_answers() -> Any:
    model = transformed(tsa.Routed())
    exact = generate(model, **LONG)
    attached(model).plan = tsa.Plan(prefill=tsa.Dense(), decode=tsa.Routed(SPARSE))
    cache = transformers.DynamicCache(config=model.config)
    sparse = torch.stack(generate(model, **LOGITS, **{cache_name(model): cache}).logits)
    held = [(layer.keys.shape[2], layer.buffers.states["page_sums"]["sums"].shape[2]) for layer in cache.layers]
    length, report, refused = cache.get_seq_length(), tsa.report(model), refusals(model, cache)
    return exact, sparse, held, length, report, refused, [by_link(model, link) for link in (SLOW, FAST)], unlike(model)


def by_link(model: Any, link: Link) -> Any:
    """What was decided, the rows that are held, and the tokens; then after a crop and a second turn."""
    attached(model).plan = tsa.Plan(prefill=tsa.Dense(), decode=tsa.Routed(link=link))
    cache = transformers.DynamicCache(config=model.config)
    found, layer = [generate(model, **LONG, **{cache_name(model): cache})], cache.layers[0]
    told = [(layer.way, layer.keys.shape[2], layer.count())]
    cache.crop(-30)
    told.append((layer.way, layer.keys.shape[2], layer.count()))
    more = torch.cat([found[0][:, :177], token_ids(40, 2, seed=1)], 1)
    mask = torch.nn.functional.pad(KEYS, (0, 17), value=1)
    found.append(generate(model, input_ids=more, attention_mask=mask, max_new_tokens=4, **{cache_name(model): cache}))
    return [*told, (layer.way, layer.keys.shape[2], layer.count())], found


def unlike(model: Any) -> str:
    """Ranks that were given other numbers."""
    attached(model).plan = tsa.Plan(prefill=tsa.Dense(), decode=tsa.Routed(link=(SLOW, FAST)[dist.get_rank()]))
    with pytest.raises(ValueError, match="ranks of group") as error:
        generate(model, **LONG)
    return str(error.value)


def refusals(model: Any, cache: Any) -> list[str]:
    """What steps say that cannot be right: on a cache that someone else filled, with attention weights, under another plan."""
    found, ids, filled = [], token_ids(1, 2), transformers.DynamicCache(config=model.config)
    filled.update(torch.ones(2, 2, 3, 16), torch.ones(2, 2, 3, 16), 0)
    for mine, more in ((filled, {}), (cache, dict(output_attentions=True)), (cache, {})):
        with torch.no_grad():
            try:
                model(ids, **{cache_name(model): mine}, **more)
            except RuntimeError as error:
                found.append(str(error))
        attached(model).plan = tsa.Plan(prefill=tsa.Dense(), decode=SPARSE if found[1:] else tsa.Routed(SPARSE))
    return found


@pytest.fixture
def quiet() -> Iterator[None]:
    """pytest keeps every message of a trace, which takes longer than the trace."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("quiet")
def test_tokens_are_those_of_one_process():
    """With padding, and by pages that the ranks choose together; those of `PageSparse`: `test_pages_are_those_of_one_process`."""
    want = generate(tiny("llama", 1), **LONG)
    dense = torch.stack(generate(tiny("llama", 1), **LOGITS).logits)
    answers = run_ranks(2, routed_answers, limit=200)
    for rank, found in enumerate(answers):
        assert not isinstance(found, str), found
        exact, sparse, held, length, report, refused, decided, unlike_links = found
        assert torch.equal(exact, want)
        assert torch.equal(sparse, answers[0][1])
        assert not torch.allclose(sparse, dense, rtol=1e-3, atol=1e-4)
        assert length == 207
        assert held == [(rows_held(207, rank, 2), 64)]
        assert report.steps == {FIXED: 7 + 7}
        assert not report.warnings
        assert all(s.replaced for s in report.sites if s.policy == "Routed")
        assert refused[0].startswith("a decode step cannot run on this cache: the cache is not empty")
        assert "attention weights are asked for" in refused[1]
        assert "the plan's keys are all in buffers, and layers [0] of the cache" in refused[2]
        for (told, tokens), way in zip(decided, ("route", "fetch"), strict=True):
            rows = [rows_held(n, rank, 2) if way == "route" else n for n in (207, 177, 220)]
            kept = None if way == "route" else way  # cropped rows are another sequence; what was fetched stays
            assert told == [(way, rows[0], 207), (kept, rows[1], 177), (way, rows[2], 220)]
            assert torch.equal(tokens[0], want)
            assert torch.equal(tokens[1], decided[0][1][1])
        assert "a decode step of Routed: ranks of group '0' differ in the cheapest way: 0 on rank 0, 1 on rank 1" in unlike_links


def test_without_a_group_or_a_session_it_is_an_error():
    with torch.no_grad(), pytest.raises(RuntimeError, match="no process group: start with torchrun"):
        transformed(tsa.Routed())(token_ids(5))
    mixed = tsa.Plan(decode=tsa.Routed(group="a"), rules=[("model.layers.0.*", "decode", tsa.Exact())])
    with torch.no_grad(), pytest.raises(ValueError, match="let every decode policy of the plan be the same"):
        tsa.transform(tiny("llama", 1), mixed)(token_ids(5))
    for entrance in (as_backend, as_implementation):
        with pytest.raises(Exception, match=r"Routed needs what tsa_compile\.transform does"):  # Dynamo's own, or a ValueError
            entrance(tsa.Plan(decode=tsa.Routed()))


def as_backend(plan: tsa.Plan) -> Any:
    return torch.compile(torch.nn.Linear(1, 1), backend="tsa", options={"policy": plan})(torch.ones(1))


def as_implementation(plan: tsa.Plan) -> Any:
    from tsa_compile.frontends import hf

    hf.register(plan)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"inner": tsa.Dense()}, r"Routed.inner must be Exact\(\) or a PageSparse, got Dense"),
        ({"group": ""}, "Routed.group must be the name of a process group, or None, got ''"),
        ({"link": {}}, "Routed.link must be a tsa_compile.cache.route_cost.Link, or None, got {}"),
        ({"link": SLOW, "inner": SPARSE}, r"Routed.link is for inner=Exact\(\)"),
        ({"link": SLOW, "steps": 0}, "Routed.steps must be an int >= 1, got 0"),
        ({"link": dataclasses.replace(SLOW, recompute=1e-6)}, "Routed.link.recompute must be None"),
    ],
)
def test_a_bad_value_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        tsa.Routed(**fields)


def test_round_trip():
    for policy in (tsa.Routed(), tsa.Routed(SPARSE, group="3"), tsa.Routed(link=FAST, steps=9)):
        assert from_dict(policy.to_dict()) == policy


@pytest.mark.slow  # tests/kernels/test_routed.py compares what is chosen
def test_pages_are_those_of_one_process():
    chosen = torch.stack(generate(transformed(SPARSE), **LOGITS).logits)
    for found in run_ranks(2, routed_answers, limit=200):
        torch.testing.assert_close(found[1], chosen, rtol=1e-4, atol=1e-5)


def modes(names: list[str]) -> list[Any]:
    model = transformed(tsa.Routed(), layers=2)
    found = [generate(model, **given(name)) for name in names]
    cache, name = transformers.DynamicCache(config=model.config), cache_name(model)
    ids = token_ids(70, 2)
    with torch.no_grad():
        parts = [model(part, **{name: cache}).logits for part in ids.split([30, 1, 1, 20, 1, 17], 1)]
        mine = copy.deepcopy(cache)
        cache.crop(-25)
        parts += [model(ids[:, :1], **{name: c}).logits for c in (cache, mine)]
    return [*found, torch.cat(parts, 1)]


def given(mode: str) -> dict[str, Any]:
    prompt = token_ids(20).repeat(1, 2) if mode == "prompt lookup" else token_ids(40, 2)
    return dict(input_ids=prompt, **MODES[mode])


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "names"), [(2, [mode for mode in MODES if mode != "static"]), (4, ["greedy"])])
def test_modes(ranks, names):
    found = run_ranks(ranks, modes, names, limit=500)
    plain = tiny("llama")
    want = [generate(plain, **given(name)) for name in names]
    cache, name, ids = transformers.DynamicCache(config=plain.config), cache_name(plain), token_ids(70, 2)
    with torch.no_grad():
        parts = [plain(part, **{name: cache}).logits for part in ids.split([30, 1, 1, 20, 1, 17], 1)]
        mine = copy.deepcopy(cache)
        cache.crop(-25)
        parts += [plain(ids[:, :1], **{name: c}).logits for c in (cache, mine)]
    for rank in found:
        assert not isinstance(rank, str), rank
        for mode, expected, got in zip(names, want, rank, strict=False):
            assert torch.equal(got, expected), mode
        torch.testing.assert_close(rank[-1], torch.cat(parts, 1), rtol=1e-4, atol=1e-5)
