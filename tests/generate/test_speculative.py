"""Speculative generation: the tokens of the untouched model, whatever drafts them."""

from __future__ import annotations

import gc
import logging

import pytest
import torch

import tsa_compile as tsa
from tests.cache.models import cache_name, tiny, token_ids
from tsa_compile.generate.drafts import PromptLookup, Proposed
from tsa_compile.session import attached
from tsa_compile.steps import FIXED, REPLAYED

transformers = pytest.importorskip("transformers")

FEW = tsa.PageSparse(pages=1, sinks=0, recent=1)  # drafts that are often wrong, and often right
LEFT = torch.ones(3, 40, dtype=torch.long)
LEFT[0, :7] = LEFT[2, :20] = 0
BATCH = dict(ids=token_ids(40, 3) * LEFT, attention_mask=LEFT)


@pytest.fixture(scope="module")
def models():
    """(untouched, transformed)."""
    torch._dynamo.reset()
    plain, ours = (tiny("llama", layers=1) for _ in range(2))
    return plain, tsa.transform(ours, tsa.Plan(prefill=tsa.Dense(), decode=tsa.Exact(), draft=FEW))


def both(models, draft=FEW, ids=None, more=None, **options):
    """(tokens of the untouched model, those of speculation, what the latter came to)."""
    ids = token_ids(40) if ids is None else ids
    options = {"max_new_tokens": 24, "do_sample": False, **options}
    attached(models[1]).speculation = None
    want = models[0].generate(ids, **options)
    got = tsa.generate(models[1], ids, draft=draft, **{"gamma": 4, **options, **(more or {})})
    return want, got, tsa.report(models[1]).speculation


def draft_has_no_policy(draft):
    return draft == "lookup" or isinstance(draft, Wrong)


class Wrong:
    """A draft that is wrong in half of its places, at random."""

    policy = None

    def propose(self, request, n):
        tokens = torch.randint(2, 128, (request.rows.batch, n))
        request.rows.propose(tokens)
        return Proposed(tokens)


@pytest.mark.parametrize("draft", [FEW, "window", "lookup", Wrong()], ids=["pages", "window", "lookup", "wrong"])
def test_greedy_tokens_are_the_models(models, draft):
    ids = token_ids(20).repeat(1, 2)
    want, got, seen = both(models, draft, ids)
    assert torch.equal(want, got)
    assert seen.tokens == 24
    assert seen.verified_tokens + seen.plain_steps == 23
    assert seen.draft_sites == seen.sparse_sites == (0 if draft_has_no_policy(draft) else 1)
    if draft == "window":  # it reads all of a context as short as this
        assert seen.acceptance == [1.0] * 4
        assert seen.tokens_a_verify > 4


def test_rows_of_a_batch_keep_what_each_has_accepted(models):
    """Rows of different lengths in one cache, prompts padded: no row waits for another."""
    want, got, seen = both(models, **BATCH)
    assert torch.equal(want, got)
    assert not seen.notes
    assert seen.verify_steps < seen.verified < 3 * seen.verify_steps  # rows end in different rounds


def test_end_tokens_inside_a_draft(models):
    free = models[0].generate(BATCH["ids"], attention_mask=LEFT, max_new_tokens=24, do_sample=False)[:, 40:]
    want, got, _ = both(models, **BATCH, eos_token_id=[int(free[0, 3]), int(free[1, 9])], pad_token_id=0)
    assert torch.equal(want, got)
    for eos in models[0].generate(token_ids(40), max_new_tokens=9, do_sample=False)[0, 40:].tolist():
        want, got, _ = both(models, "window", eos_token_id=eos, pad_token_id=0)
        assert torch.equal(want, got)


@pytest.mark.parametrize("new", [1, 2, 5, 6])
def test_lengths(models, new):
    want, got, _ = both(models, "window", max_new_tokens=new)
    assert torch.equal(want, got)


PROCESSORS = {
    "repetition": dict(repetition_penalty=1.7),
    "no repeated pairs": dict(no_repeat_ngram_size=2),
    "least length": dict(min_new_tokens=9, eos_token_id=[5, 9, 40, 77, 101, 120], pad_token_id=0),
    "rows by number": dict(prefix_allowed_tokens_fn=lambda b, ids: [b + 3, 5 + int(ids[-1]) % 100, b + 20]),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_logits_processors_on_both_sides(models, name):
    for ids in ({}, BATCH):
        want, got, _ = both(models, **ids, **PROCESSORS[name])
        assert torch.equal(want, got)


class StopAt(transformers.StoppingCriteria):
    """A row ends where its tokens from `begin` on have a sum of at least `total`."""

    def __init__(self, begin, total):
        self.begin, self.total = begin, total

    def __call__(self, ids, scores, **kwargs):
        return ids[:, self.begin :].sum(1) >= self.total


def test_stopping_criteria_are_asked_after_each_token(models):
    for total in (1, 200, 500, 800):
        want, got, _ = both(models, "window", stopping_criteria=[StopAt(40, total)])
        assert torch.equal(want, got)
        batch = dict(stopping_criteria=[StopAt(40, total)], eos_token_id=127, pad_token_id=0)
        want, got, _ = both(models, **BATCH, **batch)
        assert torch.equal(want, got)


class Collect(transformers.generation.BaseStreamer):
    def __init__(self):
        self.puts, self.ended = [], False

    def put(self, value):
        self.puts.append(value.tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("batch", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_streamers_get_what_is_accepted_token_by_token(models, batch):
    want, got = Collect(), Collect()
    options = {"max_new_tokens": 12, "do_sample": False}
    models[0].generate(token_ids(40, batch), streamer=want, **options)
    tsa.generate(models[1], token_ids(40, batch), streamer=got, draft=FEW, **options)
    assert got.puts == want.puts
    assert got.ended


@pytest.mark.parametrize("batch", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_scores_and_the_cache_are_returned(models, batch):
    options = dict(return_dict_in_generate=True, output_scores=True, output_logits=True, repetition_penalty=1.2)
    want, got, seen = both(models, ids=token_ids(40, batch), **options)
    assert torch.equal(want.sequences, got.sequences)
    for field in ("scores", "logits"):
        for a, b in zip(want[field], got[field], strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    name = cache_name(models[1])
    for a, b in zip(want[name].layers, got[name].layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys, atol=1e-4, rtol=1e-4)  # what was drafted was written again
    assert sum("by the fewest tokens" in note for note in seen.notes) == (batch > 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [dict(inputs_embeds=True), dict(prefill_chunk_size=13), dict(num_return_sequences=2, do_sample=True, top_k=1)],
    ids=lambda options: next(iter(options)),
)
def test_ways_to_prefill(models, options):
    ids = token_ids(40)
    if "inputs_embeds" in options:
        options = {"inputs_embeds": models[0].get_input_embeddings()(ids).detach()}
    else:
        options = {**options, "input_ids": ids}
    options = {"max_new_tokens": 12, "do_sample": False, **options}
    assert torch.equal(models[0].generate(**options), tsa.generate(models[1], **options, draft=FEW, gamma=4))


@pytest.mark.slow
def test_a_cache_that_goes_on(models):
    """The next turn of a conversation, over the first one's cache."""
    results = []
    for model, run in ((models[0], {}), (models[1], {"custom_generate": tsa.speculative(FEW, 4)})):
        cache = transformers.DynamicCache(config=model.config)
        given = {cache_name(model): cache, "max_new_tokens": 9, "do_sample": False}
        first = model.generate(token_ids(30), **given, **run)
        results.append(model.generate(torch.cat([first, token_ids(5)], 1), **given, **run))
    assert torch.equal(*results)


def test_sampling_where_one_token_alone_may_come(models):
    want, got, seen = both(models, do_sample=True, top_k=1)
    assert torch.equal(want, got)
    assert 0 < seen.acceptance[0] < 1


@pytest.mark.slow
@pytest.mark.parametrize("draft", [FEW, "lookup"], ids=str)
def test_sampled_tokens_have_the_models_law(models, draft):
    """2,048 rows in one batch, each accepting what it does: the law of the first three tokens, over 6 that may be sampled at all.

    Within five standard errors for each single outcome of the first two and for each third token.
    """
    ids, allowed, rows = token_ids(12), list(range(3, 9)), 2048
    other = [t for t in range(128) if t not in allowed]
    options = dict(max_new_tokens=4, do_sample=True, temperature=1.3, top_k=5, top_p=0.95, suppress_tokens=other)
    torch.manual_seed(1)
    got = tsa.generate(models[1], ids.expand(rows, -1), draft=draft, gamma=3, **options)[:, 12:]
    law = torch.zeros(128, 128, 128, dtype=torch.float64)
    for a in allowed:
        for b in allowed:
            shown = torch.cat([ids, torch.tensor([[a, b, 0]])], 1)
            with torch.no_grad():
                logits = models[0](shown).logits[0, 11:14]
            first, second, third = (warped(models[0], shown[:, : 12 + n], logits[n], options) for n in range(3))
            law[a, b] = first[a] * second[b] * third
    torch.testing.assert_close(law.sum(), torch.ones((), dtype=torch.float64))
    seen = torch.zeros_like(law).index_put(tuple(got[:, :3].T), torch.ones(rows, dtype=torch.float64), accumulate=True) / rows
    for share, sure in ((seen.sum(2), law.sum(2)), (seen.sum((0, 1)), law.sum((0, 1)))):
        error = 5 * (sure * (1 - sure) / rows).sqrt() + 1e-9
        assert ((share - sure).abs() <= error).all()


def warped(model, ids, logits, options):
    """The law of the next token as `generate()` of the untouched model makes it."""
    config = transformers.GenerationConfig(**{k: v for k, v in options.items() if k != "max_new_tokens"})
    processors = model._get_logits_processor(config, input_ids_seq_length=ids.shape[1], device=ids.device, model_kwargs={})
    return processors(ids, logits[None].float())[0].softmax(-1).double()


def test_a_gate_switches_off_and_says_so(models, caplog):
    with caplog.at_level(logging.WARNING, "tsa_compile"):
        want, got, seen = both(models, Wrong(), more={"costs": [(1, 64, 0.3, 1.1), (8, 64, 0.0, 0.5)]}, max_new_tokens=40)
    assert torch.equal(want, got)
    assert 0 < seen.verify_steps < 6  # they lose more than a fiftieth of 40 tokens
    assert seen.plain_steps > 0
    (note,) = seen.notes
    assert "switched off for the rest of the request: rounds, of 2.30 exact steps, have lost" in note
    assert note in caplog.text
    assert note in " ".join(str(tsa.report(models[1])).split())
    seen = both(models, Wrong(), more={"costs": [(1, 64, 0.0, 0.9)]}, max_new_tokens=40)[2]
    assert not seen.notes
    seen = both(models, more={"costs": [(1, 64, 1.0, 1.1)]})[2]
    assert "costs 5.10 exact steps and gives at most 5 tokens" in next(iter(seen.notes))
    assert seen.verify_steps == 0


def test_drafts_and_verify_steps_are_recorded_side_by_side(models):
    """Each kind once, and neither takes the other's place; the next request leases the same storage and replays both."""
    session = attached(models[1])
    session.steps.recorded_on = frozenset({"cpu"})
    try:
        for _ in range(2):
            gc.collect()
            before = dict(session.steps.counts())
            both(models)
            after = session.steps.counts()
    finally:
        session.steps.recorded_on = frozenset({"cuda"})
    assert after[FIXED] - before[FIXED] == 0
    assert after[REPLAYED] - before[REPLAYED] > 20


@pytest.mark.slow
def test_the_plan_is_the_models_own_again(models):
    session, plan = attached(models[1]), attached(models[1]).plan
    both(models)
    assert session.plan is plan
    assert torch.equal(*(m.generate(token_ids(40), max_new_tokens=12, do_sample=False) for m in models))


def test_drafts_that_read_every_key_are_told(models, monkeypatch):
    monkeypatch.setattr(tsa.PageSparse, "refuse", lambda self, site: "not today")
    want, got, seen = both(models, tsa.PageSparse(pages=2, sinks=0, recent=1))
    assert torch.equal(want, got)
    assert seen.acceptance == [1.0] * 4
    assert (seen.draft_sites, seen.sparse_sites) == (1, 0)
    assert list(seen.notes) == ["drafts read every key: not today"]


def test_an_untouched_model_is_transformed_and_restored(caplog):
    model, ids = tiny("llama", layers=1), token_ids(30)
    want = model.generate(ids, max_new_tokens=6, do_sample=False)
    with caplog.at_level(logging.WARNING, "tsa_compile"):
        recipe = tsa.speculative(tsa.PageSparse(keep=0.5), gamma=2)
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, custom_generate=recipe), want)
    assert "tsa_compile.restore(model) undoes it" in caplog.text
    tsa.restore(model)
    assert torch.equal(tsa.generate(model, ids, max_new_tokens=6, do_sample=False), want)
    assert attached(model) is None


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_layers_with_a_window(family):
    """Their rows have one length: the batch goes on together."""
    torch._dynamo.reset()
    plain, ours = tiny(family), tiny(family)
    for ids in (token_ids(40), token_ids(40, 2)):
        options = dict(max_new_tokens=24, do_sample=False)
        want = plain.generate(ids, **options)
        for draft in (FEW, Wrong(), "window"):
            assert torch.equal(tsa.generate(ours, ids, draft=draft, gamma=4, **options), want)
    assert any("together" in note or "by the fewest" in note for note in tsa.report(ours).speculation.notes)


@pytest.mark.gpu
@pytest.mark.parametrize("draft", [FEW, tsa.Remembered("verify", keys=6, ratio=0.1), "lookup"], ids=["pages", "verify", "lookup"])
def test_recorded_on_a_gpu(draft):
    """The tokens are the untouched model's; the second request replays every step."""
    torch._dynamo.reset()
    plain, ours = (tiny("llama").cuda() for _ in range(2))
    for call in (dict(inputs=token_ids(40).cuda()), dict(inputs=BATCH["ids"].cuda(), attention_mask=LEFT.cuda())):
        options = dict(max_new_tokens=24, do_sample=False)
        want = plain.generate(**call, **options)
        for _ in range(2):
            gc.collect()
            before = dict(attached(ours).steps.counts()) if attached(ours) else {}
            assert torch.equal(tsa.generate(ours, **call, **options, draft=draft, gamma=4), want)
        after = attached(ours).steps.counts()
        assert after[REPLAYED] > before.get(REPLAYED, 0)
        assert after[FIXED] == before[FIXED]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_beams=2), "speculation does not go with beams"),
        (dict(use_cache=False), "use_cache=False"),
        (dict(output_attentions=True, return_dict_in_generate=True), "output_attentions"),
        pytest.param(
            dict(cache_implementation="static", disable_compile=True),
            "a DynamicCache that can be cropped, got a StaticCache",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_it_does_not_do(models, options, message):
    with pytest.raises(ValueError, match=message):
        tsa.generate(models[1], token_ids(20), draft=FEW, max_new_tokens=4, **{"do_sample": False, **options})


def test_arguments():
    for gamma in (0, 16, True, 2.0):
        with pytest.raises(ValueError, match="gamma must be an int from 1 to 15"):
            tsa.speculative(FEW, gamma)
    with pytest.raises(ValueError, match="Cost: batch and length of at least 1"):
        tsa.speculative(FEW, costs=[(1, 0, 0.1, 1.0)])
    with pytest.raises(ValueError, match=r"PromptLookup.longest must be an int of at least 1, got 0"):
        PromptLookup(0)
