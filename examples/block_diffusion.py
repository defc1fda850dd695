"""Block diffusion whose first step remembers what the further steps of a block read. Trains a tiny model, in seconds.

Facts lie in a prefix, questions begin the last block, and each step fills in one answer. A checkpoint of SDAR, LLaDA, LLaDA 2 or
Fast-dLLM v2 in a folder needs no training, and is sampled as it was made to be:

    found = tsa_compile.generate.checkpoints.load(folder)
    found.diffuse(ids, new_tokens, plan=tsa.Remembered("denoise_first", keys=512))

python examples/block_diffusion.py
"""

import torch

import tsa_compile as tsa
from tsa_compile.generate.diffusion import diffuse
from tsa_compile.tools.diffusion.recall_task import RecallTask
from tsa_compile.tools.diffusion.train import evaluate, train

task = RecallTask(keys=4, values=4, questions=3, prefix=12)
model = train(task, task.sizes(width=32, layers=2, heads=2, kv_heads=1, mlp=64), steps=160, batch=64, rate=2e-2)

remembered = {k: tsa.Remembered("denoise_first", keys=k, dense_layers=0) for k in (1, 3, 6)}
for name, outcome in evaluate(model, task, {"every key": None} | {f"{k} keys": p for k, p in remembered.items()}).items():
    print(f"{name} of {task.prefix}: {outcome.right:.1%} right, {outcome.forwards:.0f} denoising calls")

prompt = task.sample(1, torch.Generator().manual_seed(7))[:, : -task.questions]
done = diffuse(model, prompt, task.questions, mask_id=model.sizes.mask_id, block=task.block, plan=remembered[6])
print(done)
