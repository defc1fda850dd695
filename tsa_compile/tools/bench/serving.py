"""vLLM with its own attention and with ours, same weights and requests: agreement, time to the first token, decode, mixed load.

python -m tsa_compile.tools.bench.serving --out FOLDER [--model FOLDER] [--cases ttft,decode,agree,mixed,sync,...] [--smoke]

Without `--model` a Llama-3.1-8B of random weights, from its numbers alone. Cases share engines, each in a process of its own:
vLLM's, one whose prefill is sparse, one whose decode reads pages. What an engine measures is at once a line of `serving.jsonl`,
and a comparison is one as soon as both sides are there, so a run that is cut short keeps what it had. `--smoke`: small sizes, for
a machine without a GPU: it shows that the script runs, its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tsa_compile.tools.bench.serving_cases import CASES, ENGINES, Sizes, join

LLAMA = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072 + 1024, rope_theta=500000.0,
    torch_dtype="bfloat16", rms_norm_eps=1e-5, hidden_act="silu", tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
TINY = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=512, max_position_embeddings=4096)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default=None)
    parser.add_argument(
        "--cases", default="ttft,decode,agree,mixed,sync", help="also: quality, of a real model; parallel, on two GPUs"
    )
    parser.add_argument("--lengths", type=_numbers, default=None, help="of the prompts, in tokens: 32768,65536,131072")
    parser.add_argument("--chunks", type=_numbers, default=None, help="most tokens of a step: 16384,8192")
    parser.add_argument("--repeats", type=int, default=3, help="of each time, after one to warm up")
    parser.add_argument(
        "--alpha", type=float, default=None, help="of BlockSparse; otherwise searched for: 0.12 of the pairs are read"
    )
    parser.add_argument("--limit", type=float, default=None, help="seconds for one engine")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        from tsa_compile.tools.bench.serving_engine import run

        for result in run(**json.loads(given.child)):
            print("\nRESULT " + json.dumps(result), flush=True)
        return
    given.out.mkdir(parents=True, exist_ok=True)
    sys.exit(Bench(given).run(given.cases.split(",")))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def save_config(folder: Path, smoke: bool) -> str:
    """A model's folder with nothing but its numbers."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA, **(TINY if smoke else {})}))
    return str(folder)


class Bench:
    """The engines of the asked cases, one after the other; results go to `out/serving.jsonl` as they come."""

    def __init__(self, given: Any) -> None:
        self.out, self.smoke, self.limit = given.out, given.smoke, given.limit
        self.dummy, self.model = given.model is None, given.model or save_config(given.out / "model", given.smoke)
        most = json.loads((Path(self.model) / "config.json").read_text())["max_position_embeddings"]
        self.sizes = Sizes.of(most, given.lengths, given.chunks, given.repeats, given.alpha, given.smoke)

    def run(self, cases: list[str]) -> int:
        """How many engines failed."""
        tasks = [task | {"case": case} for case in cases for task in CASES[case](self.sizes)]
        found: dict[str, dict[str, Any]] = {}  # by the task's name, then by engine
        failures = 0
        for name in ENGINES:
            mine = [task for task in tasks if name in task["engines"]]
            asked = [task["engines"][name] | {"name": task["name"]} for task in mine]
            failures += bool(mine) and not self.engine(
                name, asked, {task["name"]: task for task in mine}, found, "quality" in cases
            )
        return failures

    def engine(
        self, name: str, asked: list[dict[str, Any]], tasks: dict[str, Any], found: dict[str, dict[str, Any]], words: bool
    ) -> bool:
        """Write what an engine finds, and what that gives with another engine's; whether it came to its end."""
        first = self.sizes.first(name)
        for result in self.child(name, [*first, *asked], words):
            if "failed" in result:
                self.write("failed", engine=name, **result)
                return False
            task = tasks.get(result["name"], {"case": result["name"], "engines": {}})
            self.write(task["case"], engine=name, **result)
            found.setdefault(result["name"], {})[name] = result
            sides = [found[result["name"]][x] for x in task["engines"] if x in found[result["name"]]]
            if len(sides) == 2:
                self.write(task["case"], name=result["name"], **join(task["case"], *sides))
        return True

    def child(self, name: str, tasks: list[dict[str, Any]], words: bool) -> Iterator[dict[str, Any]]:
        """Results of one engine, in its own process, as they come; the last has "failed" if it did not come to its end."""
        engine = self.sizes.engine(name, self.model, self.dummy) | {"skip_tokenizer_init": not words}
        asked = json.dumps(dict(engine=engine, tasks=tasks, dummy=self.dummy, out=str(self.out / name)))
        command = [sys.executable, "-m", "tsa_compile.tools.bench.serving", "--out", str(self.out), "--child", asked]
        with (self.out / f"{name}.log").open("w") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
            timer = threading.Timer(self.limit or threading.TIMEOUT_MAX, process.kill)
            timer.daemon = True
            timer.start()
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                log.flush()
                if line.startswith("RESULT "):
                    yield json.loads(line.removeprefix("RESULT "))
            timer.cancel()
        if process.wait():
            yield {"name": name, "failed": process.returncode, "log": (self.out / f"{name}.log").read_text()[-2000:]}

    def write(self, case: str, **result: Any) -> None:
        line = json.dumps({"case": case, "time": time.strftime("%F %T"), "smoke": self.smoke, **result})
        print(line, flush=True)
        with (self.out / "serving.jsonl").open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
