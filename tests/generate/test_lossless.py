"""100 prompts on a real model (SmolLM2-135M, float32, on a CPU): speculation gives the tokens of the untouched model.

Behind pieces of real text of 24 to 120 tokens, four of different lengths in a batch; drafts read few keys, so that many of them
are refused. Some minutes.
"""

from __future__ import annotations

import pytest
import torch

import tsa_compile as tsa
from tsa_compile.session import attached

pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

PROMPTS, ROWS, NEW = 100, 4, 32
DRAFTS = {
    "verify": tsa.Remembered("verify", keys=12, ratio=0.07),
    "layer": tsa.Remembered("verify", keys=12, ratio=0.07, share="layer"),
    "pages": tsa.PageSparse(pages=2, sinks=1, recent=1),
    "lookup": "lookup",
}


@pytest.fixture(scope="module")
def requests():
    """(the model, transformed; batches of ids, mask and the tokens of the untouched model)."""
    from tsa_compile.tools.evaluate.reference_text import reference_text
    from tsa_compile.tools.load_models import load_packaged

    try:
        model, tokenizer = load_packaged("smollm2")
    except FileNotFoundError as why:
        pytest.skip(str(why))
    ids = tokenizer(reference_text()[:120_000], return_tensors="pt").input_ids[0]
    lengths = [24 + 7 * n % 97 for n in range(PROMPTS)]
    pieces = [ids[begin : begin + n] for begin, n in zip(range(0, 10**6, 150), lengths, strict=False)]
    assert len(pieces) == PROMPTS
    batches = [as_batch(pieces[n : n + ROWS]) for n in range(0, PROMPTS, ROWS)]
    own = [generate(model, *batch) for batch in batches]
    tsa.transform(model, tsa.Plan(prefill=tsa.Dense(), decode=tsa.Exact()))
    yield model, [(*batch, want) for batch, want in zip(batches, own, strict=True)]
    tsa.restore(model)


def as_batch(rows):
    """Padded at the left: ids and mask, `[n, longest]`."""
    longest = max(map(len, rows))
    ids = torch.stack([torch.cat([row.new_zeros(longest - len(row)), row]) for row in rows])
    return ids, torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()


def generate(model, ids, mask, **draft):
    options = dict(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    run = tsa.generate if draft else type(model).generate
    return run(model, ids, attention_mask=mask, **options, **draft)[:, ids.shape[1] :]


@pytest.mark.parametrize("name", DRAFTS)
def test_tokens_of_100_prompts_are_the_untouched_models(requests, name):
    model, batches = requests
    session = attached(model)
    session.speculation = None
    different = []
    for n, (ids, mask, want) in enumerate(batches):
        got = generate(model, ids, mask, draft=DRAFTS[name], gamma=6)
        width = min(got.shape[1], want.shape[1])
        for row in range(ROWS):
            if got.shape != want.shape or not torch.equal(got[row], want[row]):
                at = (got[row, :width] != want[row, :width]).nonzero()[:1].flatten().tolist()
                different.append((n, row, at))
    seen = session.speculation
    print(f"{name}: {PROMPTS} prompts, {seen}")
    assert not different
    assert seen.verify_steps >= len(batches)
    if name != "lookup":
        assert seen.draft_sites == seen.sparse_sites == 30
        assert seen.tokens_a_verify < 6  # drafts are refused, too
        assert seen.draft_loops * 6 == seen.draft_steps
