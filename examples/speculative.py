"""A Hugging Face model drafts its own tokens by sparse steps and judges them exactly: the same tokens, fewer exact steps.

python examples/speculative.py [FOLDER_OR_ID] [TEXT_FILE] [DRAFT: verify, layer, pages, window, lookup or measured]
"""

import sys
from pathlib import Path

import torch

import tsa_compile as tsa
from tsa_compile.tools.bench.prompts import essay
from tsa_compile.tools.load_models import load_causal_lm, load_tokenizer

name = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
text = Path(sys.argv[2]).read_text() if len(sys.argv) > 2 else essay(1200, seed=0)
draft = sys.argv[3] if len(sys.argv) > 3 else "verify"
model, tokenizer = load_causal_lm(name), load_tokenizer(name)
inputs = tokenizer(text, return_tensors="pt").to(model.device)

exact = model.generate(**inputs, max_new_tokens=32, do_sample=False)
tokens = tsa.generate(model, **inputs, max_new_tokens=32, do_sample=False, draft=draft)
print(tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :]))
print(f"the model's own tokens: {torch.equal(tokens, exact)}")
print(tsa.report(model).speculation)
