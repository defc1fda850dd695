"""100 prompts of a real model (SmolLM2-135M, float32, on a CPU): speculation gives the tokens of the untouched model.

Behind pieces of real text of 32 to 96 tokens, twenty in a batch; drafts read few keys, so that many of them are refused.
`tsa-compile bench lossless` is the same, and for half precision. Half an hour or more; a run that was cut goes on from the file
that TSA_LOSSLESS names.
"""

from __future__ import annotations

import os

import pytest

from tsa_compile.tools.bench import lossless
from tsa_compile.tools.bench.acceptance import DRAFTS
from tsa_compile.tools.bench.lossless_contract import told

pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


def test_tokens_of_100_prompts_are_the_untouched_models():
    from tsa_compile.tools.load_models import load_packaged

    try:
        model, tokenizer = load_packaged("smollm2")
    except FileNotFoundError as why:
        pytest.skip(str(why))
    setting, drafts = lossless.Setting(), list[str]()
    state = lossless.state_of(os.environ.get("TSA_LOSSLESS"), "smollm2", setting)
    for row in lossless.measure(model, tokenizer, setting, list(DRAFTS), state):
        print(told(row), flush=True)
        assert (row.prompts, row.equal, row.divergences) == (100, 100, ())
        drafts.append(row.draft)
        if row.draft not in ("exact", "lookup"):
            assert row.sparse[0] == row.sparse[1] > 0
            assert 1 <= row.tokens_a_verify < 4  # drafts are refused, too
    assert drafts == ["exact", *DRAFTS]
