"""One engine of `serving.py`, in a process of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from tsa_compile.tools.bench.serving_alpha import alpha, read_share, with_alpha
from tsa_compile.tools.bench.serving_quality import quality
from tsa_compile.tools.bench.serving_requests import ask


def run(engine: dict[str, Any], tasks: list[dict[str, Any]], dummy: bool, out: str) -> Iterator[dict[str, Any]]:
    """Start the engine and do the tasks: a result each, with its seconds, the counts of sparse rows and the versions.

    Args:
        engine: arguments of vLLM's `LLM`.
        tasks: name, task (of `TASKS`) and its arguments; `chunk`: most tokens of a step; `alpha`: for this task alone.
        dummy: whether weights are random.
        out: beginning of the path of files.
    """
    if engine.get("tensor_parallel_size", 1) == 1:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # this process then sees layers and counts
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # functions go to the workers, which are on this machine
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # requests are greedy
    import vllm

    begin = time.perf_counter()
    with new_weights() if dummy else contextlib.nullcontext():
        llm = vllm.LLM(**engine)
    graphs = str(llm.llm_engine.vllm_config.compilation_config.cudagraph_mode)
    yield {"name": "start", "took": time.perf_counter() - begin, "graphs": graphs, "versions": versions()}
    for number, task in enumerate(tasks):
        begin = time.perf_counter()
        yield {
            "name": task["name"],
            **do(llm, task, f"{out}-{number}.pt"),
            "took": time.perf_counter() - begin,
            "versions": versions(),
        }


def do(llm: Any, task: dict[str, Any], file: str) -> dict[str, Any]:
    """One task."""
    from tsa_compile.frontends.vllm.counts import BY_LAYER

    BY_LAYER.clear()
    asked = {key: value for key, value in task.items() if key not in ("name", "task", "chunk", "alpha")}
    if task["task"] == "quality":
        asked["file"] = file
    with steps_of(llm, task.get("chunk")), with_alpha(llm, task.get("alpha")):
        result: dict[str, Any] = TASKS[task["task"]](llm, **asked)
    return {**asked, **result, "chunk": task.get("chunk"), "counts": counts()}


def new_weights() -> Any:
    """Random weights as a new model's. vLLM's are even in +-0.001, those of norms too, so that attention is flat."""
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    load = DummyModelLoader.load_weights

    def loaded(self: Any, model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        load(self, model, *args, **kwargs)
        spread(model)

    return mock.patch.object(DummyModelLoader, "load_weights", loaded)


@torch.no_grad()
def spread(model: torch.nn.Module) -> None:
    """From vLLM's random weights to matrices that keep a variance of one, and norms of one."""
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            weight.mul_((3 / weight.shape[-1]) ** 0.5 / 1e-3)
        elif "norm" in name:
            weight.fill_(1)


@contextlib.contextmanager
def steps_of(llm: Any, chunk: int | None) -> Iterator[None]:
    """With steps of `chunk` tokens at most, fewer than those that the engine was started for."""
    if chunk is None:
        yield
        return
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    if chunk > scheduler.max_num_scheduled_tokens:
        raise ValueError(f"chunk must be at most {scheduler.max_num_scheduled_tokens}, got {chunk}")
    with mock.patch.object(scheduler, "max_num_scheduled_tokens", chunk):
        yield


def counts() -> dict[str, Any] | None:
    """Sparse rows and tokens of the first layer that has any; None: none were sparse, or in other processes."""
    from tsa_compile.frontends.vllm.counts import BY_LAYER

    return dataclasses.asdict(next(iter(BY_LAYER.values()))) | {"layers": len(BY_LAYER)} if BY_LAYER else None


def versions() -> dict[str, str]:
    import vllm

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return dict(vllm=vllm.__version__, torch=torch.__version__, gpu=gpu)


def tokens(llm: Any, lengths: list[int], new: int, no_sync: bool = False) -> dict[str, Any]:
    """Greedy tokens and their log-probabilities."""
    if no_sync:
        ask(llm, lengths, new, logprobs=1)  # what is compiled once waits
    with _no_waiting() if no_sync else contextlib.nullcontext():
        answers = [x.outputs[0] for x in ask(llm, lengths, new, logprobs=1)]
    chosen = [[step[t].logprob for step, t in zip(x.logprobs, x.token_ids, strict=True)] for x in answers]
    return {"tokens": [list(x.token_ids) for x in answers], "logprobs": chosen}


def _no_waiting() -> Any:
    """A wait for the device while sparse rows are computed raises."""
    from tsa_compile.frontends.vllm import backend

    original = backend.sparse_prefill

    def guarded(*args: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            original(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return mock.patch.object(backend, "sparse_prefill", guarded)


def times(llm: Any, length: int, new: int, repeats: int) -> dict[str, Any]:
    """Seconds to the first token and between tokens, after a request to warm up, which tells the share of the pairs read."""
    (share, _), told = read_share(lambda: ask(llm, [length], 2)), []
    for _ in range(repeats):
        told.append(ask(llm, [length], new)[0].metrics)
    between = [(x.last_token_ts - x.first_token_ts) / (new - 1) for x in told]
    return {"times": [{"ttft": x.first_token_latency, "tpot": y} for x, y in zip(told, between, strict=True)], "pairs": share}


def decode(llm: Any, length: int, requests: int, new: int) -> dict[str, Any]:
    """Seconds between tokens of requests that decode together: all have one prompt, from the prefix cache, and start at once."""
    ask(llm, [length], 2, salt="decode")
    told = [x.metrics for x in ask(llm, [length] * requests, new, salt="decode")]
    begin, end = max(x.first_token_ts for x in told), min(x.last_token_ts for x in told)
    return {"tpot": (end - begin) / (new - 1)}


def together(llm: Any, lengths: list[int], new: int) -> dict[str, Any]:
    """Seconds for all requests, given at once."""
    ask(llm, lengths[:2], 2)
    begin = time.perf_counter()
    ask(llm, lengths, new)
    return {"seconds": time.perf_counter() - begin}


TASKS: dict[str, Any] = {
    "tokens": tokens, "times": times, "together": together, "decode": decode, "alpha": alpha, "quality": quality,
}  # fmt: skip
