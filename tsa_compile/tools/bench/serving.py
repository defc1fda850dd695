"""vLLM with its own attention and with ours, same weights and requests: agreement, time to the first token, decode, mixed load.

python -m tsa_compile.tools.bench.serving --out FOLDER [--model FOLDER] [--cases agree,ttft,decode,sync,...] [--smoke]

Without `--model` a Llama-3.1-8B of random weights, from its numbers alone. Each engine is a process of its own, so that memory
and graphs of one cannot reach the other; a case's results are a JSON line in `serving.jsonl`, with the versions and the GPU.
`--smoke`: small sizes, for a machine without a GPU: it shows that the script runs, its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LLAMA = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072 + 1024, rope_theta=500000.0,
    torch_dtype="bfloat16", rms_norm_eps=1e-5, hidden_act="silu", tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
TINY = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=512, max_position_embeddings=4096)  # fmt: skip
LENGTHS, CHUNKS = (32768, 65536, 131072), (8192, 16384)
SMOKE_LENGTHS, SMOKE_CHUNKS = (512, 1024, 2048), (256,)
PAIRS = 0.12  # share of the causal pairs of tokens that are read, to which alpha is set


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default=None)
    parser.add_argument("--cases", default="agree,ttft,decode,sync,mixed", help="also: parallel, on two GPUs")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        from tsa_compile.tools.bench.serving_engine import run

        print("\nRESULT " + json.dumps(run(**json.loads(given.child))))
        return
    given.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(given.out, given.model or save_config(given.out / "model", given.smoke), given.smoke, given.model is None)
    for case in given.cases.split(","):
        getattr(bench, case)()


def save_config(folder: Path, smoke: bool) -> str:
    """A model's folder with nothing but its numbers."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA, **(TINY if smoke else {})}))
    return str(folder)


class Bench:
    """The cases; results go to `out/serving.jsonl` as they come."""

    def __init__(self, out: Path, model: str, smoke: bool, dummy: bool) -> None:
        self.out, self.smoke = out, smoke
        self.lengths = SMOKE_LENGTHS if smoke else LENGTHS
        self.chunks: tuple[int, ...] = SMOKE_CHUNKS if smoke else CHUNKS
        longest = self.lengths[-1] + (64 if smoke else 512)
        self.engine: dict[str, Any] = dict(model=model, max_model_len=longest, max_num_batched_tokens=self.chunks[0], seed=0)
        self.engine |= dict(skip_tokenizer_init=True, enable_prefix_caching=False, disable_log_stats=False)
        if dummy:
            self.engine["load_format"] = "dummy"
        if smoke:
            self.engine |= dict(dtype="float32", enforce_eager=True, block_size=32, max_num_seqs=4)
        else:
            self.engine |= dict(gpu_memory_utilization=0.92)
        self.alpha: float | None = None

    def child(self, tsa: dict[str, Any] | None, **what: Any) -> dict[str, Any]:
        """One engine, in its own process: vLLM's attention if `tsa` is None."""
        engine = {**self.engine, **what.pop("engine", {})}
        if tsa is not None:
            engine |= dict(
                attention_backend="CUSTOM", additional_config={"tsa": {**tsa, "min_context": 0 if self.smoke else 4096}}
            )
        asked = json.dumps(dict(engine=engine, **what))
        command = [sys.executable, "-m", "tsa_compile.tools.bench.serving", "--out", str(self.out), "--child", asked]
        done = subprocess.run(command, capture_output=True, text=True)
        (self.out / "last.log").write_text(done.stdout + done.stderr)
        found = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if done.returncode or not found:
            raise RuntimeError(
                f"an engine failed ({done.returncode}); its log is {self.out / 'last.log'}:\n{done.stderr[-2000:]}"
            )
        return json.loads(found[0])

    def write(self, case: str, **result: Any) -> None:
        line = json.dumps({"case": case, "time": time.strftime("%F %T"), "smoke": self.smoke, **result})
        print(line, flush=True)
        with (self.out / "serving.jsonl").open("a") as file:
            file.write(line + "\n")

    def sparse(self) -> dict[str, Any]:
        """The plan that reads `PAIRS` of the pairs of the shortest length, found by bisection in one engine."""
        if self.alpha is None:
            found = self.child({"policy": "BlockSparse"}, task="alpha", length=self.lengths[0], pairs=PAIRS)
            self.alpha = found["alpha"]
            self.write("alpha", **found)
        return {"policy": "BlockSparse", "alpha": self.alpha}

    def agree(self) -> None:
        """Every key read: greedy tokens and their log-probabilities against the engine's own."""
        asked = dict(task="tokens", lengths=[self.lengths[0], self.lengths[0] // 3, 100], new=32)
        own, ours = self.child(None, **asked), self.child({"policy": "BlockSparse", "alpha": 0.0}, **asked)
        self.write("agree", **compare(own, ours), counts=ours["counts"], versions=ours["versions"])

    def parallel(self) -> None:
        """Two GPUs against one."""
        asked = dict(task="tokens", lengths=[self.lengths[0], 100], new=32)
        one, two = (self.child(self.sparse(), **asked, engine=dict(tensor_parallel_size=n)) for n in (1, 2))
        self.write("parallel", **compare(one, two), versions=one["versions"])

    def ttft(self) -> None:
        """Time to the first token, and between tokens, of one request, in turns of engines."""
        plan = self.sparse()
        for chunk in self.chunks:
            asked = dict(task="times", lengths=self.lengths, new=8 if self.smoke else 64, repeats=1 if self.smoke else 3)
            own, ours = (self.child(tsa, **asked, engine=dict(max_num_batched_tokens=chunk)) for tsa in (None, plan))
            for length, a, b in zip(self.lengths, own["times"], ours["times"], strict=True):
                row = {key: statistics.median(x[key] for x in times) for times, key in ((a, "ttft"), (a, "tpot"))}
                sparse = {key: statistics.median(x[key] for x in b) for key in ("ttft", "tpot")}
                ratios = {"ttft_ratio": row["ttft"] / sparse["ttft"], "tpot_ratio": row["tpot"] / sparse["tpot"]}
                self.write("ttft", length=length, chunk=chunk, own=row, tsa=sparse, **ratios, runs=[a, b], counts=ours["counts"],
                           graphs=[own["graphs"], ours["graphs"]], versions=ours["versions"])  # fmt: skip

    def decode(self) -> None:
        """Four requests of the longest length: seconds between their tokens, with 5 % of the pages read."""
        asked = dict(task="decode", length=self.lengths[-1] - 64, requests=2 if self.smoke else 4, new=16 if self.smoke else 128)
        plan = {"phases": {"prefill": {"policy": "Dense"}, "decode": {"policy": "PageSparse", "keep": 0.05}}}
        own, ours = (
            self.child(tsa, **asked, engine=dict(gpu_memory_utilization=0.88, enable_prefix_caching=True)) for tsa in (None, plan)
        )
        ratio = own["tpot"] / ours["tpot"]
        self.write("decode", own=own, tsa=ours, ratio=ratio, counts=ours["counts"], versions=ours["versions"])

    def sync(self) -> None:
        """A wait for the device in sparse rows is an error."""
        found = self.child(self.sparse(), task="tokens", lengths=[self.lengths[0]], new=4, no_sync=not self.smoke)
        self.write("sync", counts=found["counts"], versions=found["versions"])

    def mixed(self) -> None:
        """Long and short prompts at once: seconds for all, and that memory suffices."""
        lengths = [self.lengths[i % 2] // (1 + i % 5) for i in range(6 if self.smoke else 24)] + [64] * 8
        own, ours = (self.child(tsa, task="together", lengths=lengths, new=16) for tsa in (None, self.sparse()))
        self.write("mixed", own=own["seconds"], tsa=ours["seconds"], counts=ours["counts"], versions=ours["versions"])


def compare(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """How far tokens agree, and the largest difference of log-probabilities up to where they first differ."""
    worst, same = 0.0, []
    for x, y, p, q in zip(a["tokens"], b["tokens"], a["logprobs"], b["logprobs"], strict=True):
        agreed = next((i for i, (s, t) in enumerate(zip(x, y, strict=True)) if s != t), len(x))
        same.append(agreed)
        worst = max([worst, *(abs(s - t) for s, t in zip(p[:agreed], q[:agreed], strict=True))])
    return {"agreed": same, "of": [len(x) for x in a["tokens"]], "largest_difference": worst}


if __name__ == "__main__":
    main()
