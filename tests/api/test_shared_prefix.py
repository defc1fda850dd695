"""Requests of each rank's own about one corpus that the ranks of a gloo group hold together: the tokens of one process."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tsa_compile as tsa
from tests.cache.models import cache_name, tiny, token_ids
from tests.cache.test_generate import generate
from tests.ranks import run_ranks
from tsa_compile.cache.route_cost import Link
from tsa_compile.cache.shared_prefix import share_prefix
from tsa_compile.steps import FIXED

transformers = pytest.importorskip("transformers")
CORPUS, NEW = 200, 6
FAST = Link(probe=1e-3, bandwidth=1e12, attend=1e-9, merge=1e-6, splice=0.0)  # each exchange takes a millisecond


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """pytest keeps every message of a trace, which takes longer than the trace."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def requests(rank: int) -> dict[str, Any]:
    """The corpus, and two questions of a rank's own, of other lengths than another rank's; the shorter has padding before it."""
    length = 7 + 12 * rank
    ids = torch.cat([token_ids(CORPUS).expand(2, -1), token_ids(length, 2, seed=1 + rank)], 1)
    mask = torch.ones_like(ids)
    mask[1, CORPUS : CORPUS + 3] = 0
    return dict(input_ids=ids, attention_mask=mask, max_new_tokens=NEW)


def answers(layers: int, link: Link | None) -> Any:
    model = tsa.transform(tiny("llama", layers), tsa.Plan(prefill=tsa.Dense(), decode=tsa.Routed(link=link)))
    name, corpus = cache_name(model), transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(token_ids(CORPUS), **{name: corpus})
    held = corpus.layers[0].keys.shape[2]
    found = []
    for _ in range(2):  # the corpus is there for the next requests, too
        mine = share_prefix(corpus, 2)
        found.append(generate(model, **requests(dist.get_rank()), **{name: mine}, synced_gpus=True))
    assert mine.get_seq_length() == requests(dist.get_rank())["input_ids"].shape[1] + NEW - 1
    assert mine.layers[0].keys.shape[2] == mine.get_seq_length() - CORPUS
    assert corpus.get_seq_length() == CORPUS
    assert corpus.layers[0].way == (None if link is None else "fetch")
    assert corpus.layers[0].keys.shape[2] == (held if link is None else CORPUS)
    assert torch.equal(mine.layers[0].as_plain().keys[:, :, :CORPUS].amax(0), mine.layers[0].as_plain().keys[0, :, :CORPUS])
    return found, held, tsa.report(model), errors(model, corpus, mine)


def errors(model: Any, corpus: Any, mine: Any) -> list[str]:
    found = []
    attempts = [
        lambda: share_prefix(transformers.DynamicCache(config=model.config), 2),
        lambda: share_prefix(corpus, 0),
        lambda: mine.layers[0].remove_last(CORPUS),
        lambda: mine.layers[0].__deepcopy__({}),
    ]
    for attempt in attempts:
        with pytest.raises((ValueError, NotImplementedError)) as error:
            attempt()
        found.append(str(error.value))
    return found


@pytest.mark.slow  # tests/kernels/test_routed.py has the attention
@pytest.mark.parametrize(("ranks", "layers", "link"), [(2, 1, None), (4, 2, None), (2, 1, FAST)], ids=["2", "4", "fetched"])
def test_tokens_are_those_of_one_process(ranks, layers, link):
    """Queries go to the corpus, or the corpus comes to every rank, once."""
    plain = tiny("llama", layers)
    for rank, found in enumerate(run_ranks(ranks, answers, layers, link, limit=560)):
        assert not isinstance(found, str), found
        tokens, held, report, refused = found
        want = generate(plain, **requests(rank))
        assert torch.equal(tokens[0], want)
        assert torch.equal(tokens[1], want)
        assert held <= CORPUS // ranks + 16
        assert report.steps == {FIXED: 2 * (NEW - 1)}
        assert all(site.replaced for site in report.sites if site.policy == "Routed")
        assert "share_prefix takes a cache that was filled under Plan(decode=Routed())" in refused[0]
        assert "batch: 0; allowed: an int of at least 1" in refused[1]
        assert "the others are shared" in refused[2]
        assert "stand behind rows that others share takes no copies" in refused[3]
