"""A prompt that processes compute together, and a cache that is spread over them: `generate()` gives the model's own tokens.

In the prompt each rank computes its rows, and key blocks that others read travel (`ContextParallel`); here every block is read,
as `alpha` is 0. In decode each rank holds its pages, and queries travel (`Routed`). Every rank runs the same model on the same
prompt. Without a folder the model is tiny and random. gloo without GPUs, NCCL with.

torchrun --nproc-per-node 2 examples/routed.py [FOLDER]
"""

import inspect
import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

import tsa_compile as tsa
from tsa_compile.tools.bench.tune_distributed import start

device = start()
rank, ranks = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
if len(sys.argv) > 1:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).to(device).eval()
else:
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, eos_token_id=None, **sizes)).to(device).eval()

prompt = torch.randint(2, 128, (1, 700), device=device)
name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # by the version
wanted = model.generate(prompt, max_new_tokens=20, do_sample=False)
for inner in (tsa.Exact(), tsa.PageSparse(keep=0.2)):
    tsa.transform(model, tsa.Plan(prefill=tsa.ContextParallel(tsa.BlockSparse(alpha=0)), decode=tsa.Routed(inner)))
    cache = DynamicCache(config=model.config)
    tokens = model.generate(prompt, **{name: cache}, max_new_tokens=20, do_sample=False)
    same = int((tokens == wanted).sum()) - prompt.shape[1]
    held = f"holds {cache.layers[0].keys.shape[2]} of {cache.get_seq_length()} rows"
    spread = f"prompt {tsa.report(model).prompts}"
    print(f"rank {rank} of {ranks}, {type(inner).__name__}: {held}, {same} of 20 tokens alike, {spread}")
    tsa.restore(model)
dist.destroy_process_group()
