"""The cases of `serving.py`: what each asks of which engine, and what two engines' answers say together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

LENGTHS, CHUNKS = (32768, 65536, 131072), (16384, 8192)
SMOKE_LENGTHS, SMOKE_CHUNKS = (512, 1024, 2048), (512, 256)
PAIRS = 0.12  # share of the causal pairs of tokens that are read, to which alpha is set
ENGINES = ("own", "sparse", "pages", "two")  # vLLM's attention; ours in prefill; ours in decode; `sparse` on two GPUs
PAGES = {"phases": {"prefill": {"policy": "Dense"}, "decode": {"policy": "PageSparse", "keep": 0.05}}}
CAPTURED = [1, 2, 4, 8, 16, 32]  # sizes of decode steps that are recorded as graphs, of the 35 that are vLLM's default


class Sizes(NamedTuple):
    """What one machine can do in the time there is.

    Args:
        lengths, chunks: tokens of the prompts, and of a step at most.
        longest: tokens of a prompt and its answer, at most.
        repeats: of each time.
        alpha: of the sparse engine; None: searched for.
        smoke: small, in float32, without graphs.
    """

    lengths: tuple[int, ...]
    chunks: tuple[int, ...]
    longest: int
    repeats: int
    alpha: float | None
    smoke: bool

    @classmethod
    def of(
        cls,
        most: int,
        lengths: tuple[int, ...] | None,
        chunks: tuple[int, ...] | None,
        repeats: int,
        alpha: float | None,
        smoke: bool,
    ) -> Sizes:
        """For a model of `most` positions, with what was not asked for at its default."""
        wanted = lengths or (SMOKE_LENGTHS if smoke else LENGTHS)
        longest = min(most, wanted[-1] + (64 if smoke else 512))
        fitting = tuple(n for n in wanted if n < longest) or (longest - 64,)
        return cls(fitting, chunks or (SMOKE_CHUNKS if smoke else CHUNKS), longest, 1 if smoke else repeats, alpha, smoke)

    def engine(self, name: str, model: str, dummy: bool) -> dict[str, Any]:
        """Arguments of vLLM's `LLM`. The prefix cache is on, as by default; requests have salts, so it serves only where said."""
        given: dict[str, Any] = dict(model=model, max_model_len=self.longest, max_num_batched_tokens=max(self.chunks), seed=0)
        given |= dict(disable_log_stats=False, enable_prefix_caching=True)
        if dummy:
            given["load_format"] = "dummy"
        if self.smoke:
            given |= dict(dtype="float32", enforce_eager=True, block_size=32, max_num_seqs=4)
        else:
            given["gpu_memory_utilization"] = 0.88 if name == "pages" else 0.92
            given["compilation_config"] = {"cudagraph_capture_sizes": CAPTURED}
        if name == "two":
            given["tensor_parallel_size"] = 2
        if name != "own":
            plan = (
                PAGES if name == "pages" else {"policy": "BlockSparse", **({} if self.alpha is None else {"alpha": self.alpha})}
            )
            given |= dict(
                attention_backend="CUSTOM", additional_config={"tsa": {**plan, "min_context": 0 if self.smoke else 4096}}
            )
        return given

    def first(self, name: str) -> list[dict[str, Any]]:
        """What the engine does before the cases: the sparse one finds its alpha."""
        search = name == "sparse" and self.alpha is None
        return [dict(name="alpha", task="alpha", length=self.lengths[0], pairs=PAIRS)] if search else []


Tasks = list[dict[str, Any]]


def _task(name: str, own: str, ours: str, differ: dict[str, Any] | None = None, **asked: Any) -> dict[str, Any]:
    return {"name": name, "engines": {own: asked, ours: {**asked, **(differ or {})}}}


def ttft(sizes: Sizes) -> Tasks:
    """Time to the first token, and between tokens, of one request."""
    asked: dict[str, Any] = dict(task="times", new=8 if sizes.smoke else 64, repeats=sizes.repeats)
    return [
        _task(f"ttft {length} by {chunk}", "own", "sparse", length=length, chunk=chunk, **asked)
        for chunk in sizes.chunks
        for length in sizes.lengths
    ]


def decode(sizes: Sizes) -> Tasks:
    """Four requests of the longest length: seconds between their tokens, with 5 % of the pages read."""
    asked: dict[str, Any] = dict(length=sizes.lengths[-1] - 64, requests=2 if sizes.smoke else 4, new=16 if sizes.smoke else 128)
    return [_task("decode", "own", "pages", task="decode", **asked)]


def agree(sizes: Sizes) -> Tasks:
    """Every key read: greedy tokens and their log-probabilities against the engine's own."""
    lengths = [sizes.lengths[0], sizes.lengths[0] // 3, 100]
    return [_task("agree", "own", "sparse", {"alpha": 0.0}, task="tokens", lengths=lengths, new=32)]


def mixed(sizes: Sizes) -> Tasks:
    """Long and short prompts at once: seconds for all, and that memory suffices."""
    few = sizes.lengths[:2]
    lengths = [few[i % len(few)] // (1 + i % 5) for i in range(6 if sizes.smoke else 24)] + [64] * 8
    return [_task("mixed", "own", "sparse", task="together", lengths=lengths, new=16)]


def sync(sizes: Sizes) -> Tasks:
    """A wait for the device in sparse rows is an error."""
    asked = dict(task="tokens", lengths=[sizes.lengths[0]], new=4, no_sync=not sizes.smoke)
    return [{"name": "sync", "engines": {"sparse": asked}}]


def parallel(sizes: Sizes) -> Tasks:
    """Two GPUs against one. The engine on two cannot be told another alpha, so it must be given."""
    if sizes.alpha is None:
        raise ValueError("parallel: --alpha is needed, as other processes cannot be told the one that was found")
    return [_task("parallel", "sparse", "two", task="tokens", lengths=[sizes.lengths[0], 100], new=32)]


def quality(sizes: Sizes) -> Tasks:
    """A number hidden in a text of a real model's longest length, whole and in chunks: the answer, and what the last rows say."""
    length = min(sizes.longest, sizes.lengths[-1]) - 64
    chunks = sorted({max(sizes.chunks), *(n for n in (2048, 512) if n < max(sizes.chunks))}, reverse=True)
    return [_task(f"quality by {chunk}", "own", "sparse", task="quality", length=length, chunk=chunk) for chunk in chunks]


CASES: dict[str, Callable[[Sizes], Tasks]] = {
    "ttft": ttft, "decode": decode, "agree": agree, "mixed": mixed, "sync": sync, "parallel": parallel, "quality": quality,
}  # fmt: skip


def join(case: str, a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """What two engines' results of one task say: `a` of vLLM's own attention, or of one GPU."""
    if case in ("agree", "parallel"):
        return compare(a, b)
    if case == "quality":
        from tsa_compile.tools.bench.serving_quality import distance

        return distance(a["logits"], b["logits"])
    first, second = _middle(a), _middle(b)
    return {"own": first, "tsa": second, **{f"{key}_ratio": first[key] / second[key] for key in first}}


def _middle(side: dict[str, Any]) -> dict[str, float]:
    """Seconds of one engine: medians where there are several."""
    several = side.get("times", [side])
    return {key: statistics.median(x[key] for x in several) for key in ("ttft", "tpot", "seconds") if key in several[0]}


def compare(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """How far tokens agree, and the largest difference of log-probabilities up to where they first differ."""
    worst, same = 0.0, []
    for x, y, p, q in zip(a["tokens"], b["tokens"], a["logprobs"], b["logprobs"], strict=True):
        agreed = next((i for i, (s, t) in enumerate(zip(x, y, strict=True)) if s != t), len(x))
        same.append(agreed)
        worst = max([worst, *(math.fabs(s - t) for s, t in zip(p[:agreed], q[:agreed], strict=True))])
    return {"agreed": same, "of": [len(x) for x in a["tokens"]], "largest_difference": worst}
