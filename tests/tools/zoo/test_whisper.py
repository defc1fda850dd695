"""Whisper generates with its own prompt of decoder tokens: the decoder's prefill is replaced, the answer is the dense one."""

from __future__ import annotations

import pytest
import torch

import tsa_compile as tsa
from tests.passes.graphs import KEEP_ALL
from tsa_compile.tools.zoo.transformers_models import SEQ2SEQ


def test_generate():
    transformers = pytest.importorskip("transformers")
    config = transformers.WhisperConfig(**SEQ2SEQ, num_mel_bins=16, max_source_positions=60, max_target_positions=64)
    model = transformers.WhisperForConditionalGeneration(config).eval()
    inputs = dict(input_features=torch.randn(1, 16, 120), decoder_input_ids=torch.randint(3, 90, (1, 24)))
    with torch.no_grad():
        dense = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        tsa.transform(model, KEEP_ALL)
        sparse = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(sparse, dense)
    assert len(tsa.report(model).replaced) == config.decoder_layers
