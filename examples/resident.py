"""Keys and values in host memory, a part of them on the device: what is read, what is moved, and what is lost.

Without a folder the model is tiny and random, so its attention is nearly even and much of it lies outside of any small set.

python examples/resident.py [FOLDER]
"""

import inspect
import sys

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

import tsa_compile as tsa

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
if len(sys.argv) > 1:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).to(device).eval()
else:
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, eos_token_id=None, **sizes)).to(device).eval()

name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # by the version
prompt = torch.randint(2, 128, (1, 1500), device=device)
wanted = model.generate(prompt, max_new_tokens=20, do_sample=False)
for policy in (tsa.Resident(keep=0.13, interval=8, sample=4), tsa.Resident(keep=0.13, interval=8, strict=True)):
    tsa.transform(model, tsa.Plan(prefill=tsa.Dense(), decode=policy))
    cache = DynamicCache(config=model.config)
    tokens = model.generate(prompt, **{name: cache}, max_new_tokens=20, do_sample=False)
    same = int((tokens == wanted).sum()) - prompt.shape[1]
    counts = cache.layers[0].resident.counts
    print(
        f"{'strict' if policy.strict else 'resident pages alone'}: {same} of 20 tokens alike, lost mass {counts.lost_mass:.2f},",
        end="",
    )
    print(f" {counts.to_host / 1e6:.1f} MB to the host, {counts.to_device / 1e6:.1f} MB to the device in {counts.steps} steps")
    tsa.restore(model)
