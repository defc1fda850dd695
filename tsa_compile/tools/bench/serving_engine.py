"""One engine of `serving.py`, in a process of its own."""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any
from unittest import mock

import torch


def run(engine: dict[str, Any], task: str, **asked: Any) -> dict[str, Any]:
    """Start the engine and do one task; every result has the counts of sparse rows and the versions."""
    if engine.get("tensor_parallel_size", 1) == 1:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # this process then sees layers and counts
    import vllm

    llm = vllm.LLM(**engine)
    tasks: dict[str, Any] = {"tokens": tokens, "times": times, "together": together, "decode": decode, "alpha": alpha}
    result = tasks[task](llm, **asked)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = dict(vllm=vllm.__version__, torch=torch.__version__, gpu=gpu)
    return {**result, "counts": counts(), "versions": versions}


def counts() -> dict[str, Any] | None:
    """Sparse rows and tokens of the first layer that has any; None: none were sparse, or in other processes."""
    from tsa_compile.frontends.vllm.counts import BY_LAYER

    return dataclasses.asdict(next(iter(BY_LAYER.values()))) | {"layers": len(BY_LAYER)} if BY_LAYER else None


def prompt(length: int, vocabulary: int, seed: int) -> dict[str, list[int]]:
    g = torch.Generator().manual_seed(seed)
    return {"prompt_token_ids": torch.randint(3, vocabulary, (length,), generator=g).tolist()}


def _ask(llm: Any, lengths: list[int], new: int, same: bool = False, **sampling: Any) -> list[Any]:
    from vllm import SamplingParams

    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    given = [prompt(n, vocabulary, 0 if same else seed) for seed, n in enumerate(lengths)]
    wanted = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, **sampling)
    return llm.generate(given, wanted, use_tqdm=False)


def tokens(llm: Any, lengths: list[int], new: int, no_sync: bool = False) -> dict[str, Any]:
    """Greedy tokens and their log-probabilities."""
    if no_sync:
        _forbid_waiting()
    answers = [x.outputs[0] for x in _ask(llm, lengths, new, logprobs=1)]
    chosen = [[step[t].logprob for step, t in zip(x.logprobs, x.token_ids, strict=True)] for x in answers]
    return {"tokens": [list(x.token_ids) for x in answers], "logprobs": chosen}


def _forbid_waiting() -> None:
    """From now on a wait for the device while sparse rows are computed raises; the first row warms up what is compiled once."""
    from tsa_compile.frontends.vllm import backend

    original, calls = backend.sparse_prefill, list[None]()

    def guarded(*args: Any) -> None:
        calls.append(None)
        torch.cuda.set_sync_debug_mode("error" if len(calls) > 64 else "default")
        try:
            original(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    mock.patch.object(backend, "sparse_prefill", guarded).start()


def times(llm: Any, lengths: list[int], new: int, repeats: int) -> dict[str, Any]:
    """Seconds to the first token and between tokens, for each length `repeats` times, after one of each to warm up."""
    found = []
    for length in lengths:
        _ask(llm, [length], 2)
        told = [_ask(llm, [length], new)[0].metrics for _ in range(repeats)]
        between = [(x.last_token_ts - x.first_token_ts) / (new - 1) for x in told]
        found.append([{"ttft": x.first_token_latency, "tpot": y} for x, y in zip(told, between, strict=True)])
    return {"times": found, "graphs": str(llm.llm_engine.vllm_config.compilation_config.cudagraph_mode)}


def decode(llm: Any, length: int, requests: int, new: int) -> dict[str, Any]:
    """Seconds between tokens of requests that decode together: all have one prompt, from the prefix cache, and start at once."""
    _ask(llm, [length], 2, same=True)
    told = [x.metrics for x in _ask(llm, [length] * requests, new, same=True)]
    begin, end = max(x.first_token_ts for x in told), min(x.last_token_ts for x in told)
    return {"tpot": (end - begin) / (new - 1), "requests": requests, "length": length}


def together(llm: Any, lengths: list[int], new: int) -> dict[str, Any]:
    """Seconds for all requests, given at once."""
    _ask(llm, lengths[:2], 2)
    begin = time.perf_counter()
    _ask(llm, lengths, new)
    return {"seconds": time.perf_counter() - begin}


def alpha(llm: Any, length: int, pairs: float) -> dict[str, Any]:
    """The alpha at which a prompt of this length reads a share `pairs` of its pairs of tokens, by bisection in one engine."""
    layers = [x.impl for x in llm.llm_engine.vllm_config.compilation_config.static_forward_context.values() if hasattr(x, "impl")]
    low, high, share, middle = 0.0, 1.0, 1.0, 0.5
    for _ in range(12):  # random weights attend almost evenly: alpha is then near 1
        for impl in layers:
            impl.tsa = impl.tsa._replace(policy=dataclasses.replace(impl.tsa.policy, alpha=middle))
        share = _share(llm, length)
        if 0.9 * pairs < share < 1.1 * pairs:
            break
        low, high = (middle, high) if share > pairs else (low, middle)
        middle = (low + high) / 2
    return {"alpha": middle, "pairs": share, "length": length}


def _share(llm: Any, length: int) -> float:
    """Share of the causal pairs of key blocks and row blocks that all layers and heads read in a prompt."""
    from tsa_compile.kernels.common.row_blocks import KEYS, ROWS
    from tsa_compile.policies.block_sparse import BlockSparse

    original, read, visible = BlockSparse.select, [], 0

    def counted(self: BlockSparse, emit: Any, site: Any, state: Any) -> Any:
        nonlocal visible
        chosen = original(self, emit, site, state)
        assert chosen is not None  # vLLM's sites name no length below which every key is read
        lists, row_blocks = chosen.bits.shape[1:3]
        first = (site.k_len - site.q_len) // ROWS
        visible += lists * sum((first + r + 1) * ROWS // KEYS for r in range(row_blocks))
        read.append(sum(((chosen.bits >> bit) & 1).sum() for bit in range(64)))
        return chosen

    with mock.patch.object(BlockSparse, "select", counted):
        _ask(llm, [length], 1)
    return float(sum(int(x) for x in read)) / visible
