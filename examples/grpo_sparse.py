"""GRPO with sparse rollouts beside dense ones: is the reward within what seeds of dense rollouts differ by?

The task has a right answer: a number hidden in a long text, to be answered with the number alone. The same model is trained for
as many steps with exact decode (four seeds) and with a schedule of pages (one seed, with weights in the loss and a gate). Then
all answer the same new prompts by exact decode. The curves go to OUT/grpo_sparse.html. A finished run is kept there, and not made
again. Needs `pip install tsa-compile[rl]`.

python examples/grpo_sparse.py OUT [--model FOLDER_OR_ID] [--schedule sparrow-1.7b-0.86] [--context 4000] [--steps 100] ...
"""

import argparse
import json
import logging
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

import tsa_compile as tsa
from tsa_compile.generate.rollout import Rollouts
from tsa_compile.rl.distill import SparseAdapter
from tsa_compile.rl.rollout_gate import RolloutGate
from tsa_compile.rl.trl import SparseGRPO, SparseRollouts
from tsa_compile.tools import plots
from tsa_compile.tools.bench.prompts import needle_prompt
from tsa_compile.tools.load_models import load_causal_lm, load_tokenizer

EXACT = tsa.Plan(prefill=tsa.Dense(), decode=tsa.Exact())


class Trainer(SparseGRPO, GRPOTrainer):
    """TRL's, with weights of tokens."""


def options() -> argparse.Namespace:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("out", type=Path)
    found.add_argument("--model", default="smollm2")
    found.add_argument("--schedule", default="sparrow-1.7b-0.86", help="a published one, or pages by 2,000 tokens: 29,45,61")
    found.add_argument("--threshold", type=float, default=0.86, help="of the gate")
    found.add_argument("--dense-layers", type=int, default=2)
    found.add_argument("--cap", type=float, default=2.0, help="of the weights; 0: no weights")
    found.add_argument("--adapter", action="store_true", help="DistillSparse: LoRA in the sparse policy alone")
    found.add_argument("--context", type=int, default=4000, help="tokens of a prompt, about")
    found.add_argument("--steps", type=int, default=100)
    found.add_argument("--prompts", type=int, default=4, help="of a step")
    found.add_argument("--samples", type=int, default=8, help="of a prompt")
    found.add_argument("--new", type=int, default=24, help="tokens of a sample, at most")
    found.add_argument("--micro", type=int, default=4, help="samples of one backward")
    found.add_argument("--lr", type=float, default=1e-5)
    found.add_argument("--dense-seeds", type=int, default=4)
    found.add_argument("--tests", type=int, default=32, help="prompts for all models after training")
    return found.parse_args()


def questions(tokenizer: Any, count: int, tokens: int, seed: int) -> Dataset:
    """Prompts of about `tokens` tokens, and the number that each asks for."""
    words = round(tokens * 200 / len(tokenizer(needle_prompt(200).text).input_ids))
    rows = []
    for n in range(count):
        needle = needle_prompt(words, depth=(n * 0.37) % 1, seed=1000 * seed + n)
        text = f"{needle.text}\n\n{needle.question} Answer with the number alone."
        rows.append({"prompt": [{"role": "user", "content": text}] if tokenizer.chat_template else text, "answer": needle.answer})
    return Dataset.from_list(rows)


def right(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """The share of the completion that the number is: 1 for the number alone, 0 without it."""
    texts = [(c if isinstance(c, str) else c[0]["content"]).strip() for c in completions]
    return [len(a) / len(text) if a in text else 0.0 for text, a in zip(texts, answer, strict=True)]


def train(name: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """One run, from the model as it is; kept in a file of its own."""
    kept = given.out / f"{name}-{seed}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    model, tokenizer = load_causal_lm(given.model, torch.float32), load_tokenizer(given.model)
    model.is_quantized = False  # the file of a packaged model is; its weights are float32 now
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    adapter = SparseAdapter(model) if given.adapter and name == "sparse" else None
    batch = given.prompts * given.samples
    if name == "dense":
        rollouts = SparseRollouts(EXACT, cap=None, batch=batch)
    else:
        pages = given.schedule.split(",")
        schedule = given.schedule if not pages[0].isdigit() else [tuple(map(int, pages))]
        gate = RolloutGate(schedule, given.threshold, dense_layers=given.dense_layers)
        rollouts = SparseRollouts(gate, cap=given.cap or None, adapter=adapter, batch=batch)
    args = GRPOConfig(
        output_dir=str(given.out / "trainer"), seed=seed, max_steps=given.steps, learning_rate=given.lr, beta=0.0,
        per_device_train_batch_size=given.micro, gradient_accumulation_steps=batch // given.micro,
        num_generations=given.samples, max_completion_length=given.new, bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    data = questions(tokenizer, given.prompts * given.steps, given.context, seed)
    trainer = Trainer(model, right, args=args, train_dataset=data, processing_class=tokenizer, rollout_func=rollouts)
    began = time.monotonic()
    trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    gated = [] if rollouts.gate is None else rollouts.gate.said
    seconds = time.monotonic() - began
    end = reward_of(model, tokenizer, given)
    found = {"rewards": rewards, "end": end, "rollouts": rollouts.history, "gate": gated, "seconds": seconds}
    kept.write_text(json.dumps(found))
    return found


@torch.no_grad()
def reward_of(model: Any, tokenizer: Any, given: argparse.Namespace) -> float:
    """Mean reward of samples by exact decode, on prompts that no run is trained on."""
    asked = questions(tokenizer, given.tests, given.context, seed=999)
    if tokenizer.chat_template:
        ids = [tokenizer.apply_chat_template(x, add_generation_prompt=True, return_dict=False) for x in asked["prompt"]]
    else:
        ids = [tokenizer(x).input_ids for x in asked["prompt"]]
    drawn = Rollouts(model.eval(), EXACT, batch=given.prompts * given.samples, ends=[tokenizer.eos_token_id])
    found = drawn(ids, given.samples, new_tokens=given.new)
    texts = tokenizer.batch_decode(
        [t[:n] for t, n in zip(found.tokens, found.lengths.tolist(), strict=True)], skip_special_tokens=True
    )
    return statistics.fmean(right(texts, [answer for answer in asked["answer"] for _ in range(given.samples)]))


def page(runs: dict[str, dict[str, Any]], said: str) -> str:
    curves = {
        name: [(float(n + 1), reward, f"{name}, step {n + 1}: {reward:.3f}") for n, reward in enumerate(run["rewards"])]
        for name, run in list(runs.items())[-6:]
    }
    plot = plots.curves(curves, "step", "reward", "linear", "linear")
    return f"<!doctype html><meta charset=utf-8><style>{plots.STYLE}</style><p>{said}</p>{plots.legend(list(curves))}{plot}\n"


def main() -> None:
    given = options()
    logging.basicConfig()
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward with a mask can give NaN (pytorch#196678)
    given.out.mkdir(parents=True, exist_ok=True)
    runs = {f"dense, seed {seed}": train("dense", seed, given) for seed in range(given.dense_seeds)}
    runs["sparse"] = train("sparse", 0, given)
    ends = [run["end"] for name, run in runs.items() if name != "sparse"]
    sparse, mean = runs["sparse"]["end"], statistics.fmean(ends)
    spread = 2 * statistics.stdev(ends) if len(ends) > 1 else 0.0
    within = "within" if abs(sparse - mean) <= spread else "outside"
    said = f"reward on new prompts: sparse {sparse:.3f}, {within} dense {mean:.3f} +- {spread:.3f} ({len(ends)} seeds)"
    for line in (said, *runs["sparse"]["gate"]):
        print(line)
    (given.out / "grpo_sparse.html").write_text(page(runs, said))


if __name__ == "__main__":
    main()
