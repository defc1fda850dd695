"""The cells of a comparison of decode policies: closeness to dense and bytes read on real prose, and times of steps."""

from __future__ import annotations

import time
from typing import Any

import torch

from tsa_compile.learn.acceptance import acceptance
from tsa_compile.learn.routes import divergence
from tsa_compile.plan import Plan
from tsa_compile.steps import FIXED, REPLAYED
from tsa_compile.tools.evaluate.decode_runner import DecodeRunner, Request
from tsa_compile.tools.evaluate.prompter import Prompter

Tensor = torch.Tensor
COUNTED = 2  # steps whose bytes are counted
WARM, TIMED = 4, 24  # steps of a timing; on a CPU half as many are timed
SEED = 0  # of what a policy draws
Values = dict[str, Any]


class TextCell:
    """`samples` passages of the reference text: the last tokens are decoded one by one after a dense prefill, as the text has
    them, and compared with what the model as it is says of the whole passage."""

    def __init__(self, runner: DecodeRunner, prompter: Prompter, length: int, samples: int, batch: int, last: int) -> None:
        self._runner, self._last = runner, last
        rows = [prompter.text(length, i, samples) for i in range(samples)]
        batches = [torch.tensor(rows[i : i + batch], device=runner.device) for i in range(0, samples, batch)]
        self._texts = [(ids[:, -last:], runner.hidden(ids, last), runner.prefill(ids[:, :-last], last)) for ids in batches]

    def measure(self, plan: Plan) -> Values:
        """Of each token, text by text: "kl" in nats, "accepted"; "top1": share of equal top tokens; "read": bytes a token."""
        self._runner.use(plan)
        torch.manual_seed(SEED)
        values: Values = {"kl": [], "accepted": []}
        same: list[float] = []
        read: dict[str, float] = {}
        for tokens, dense, prompt in self._texts:
            request, found = prompt.copied(), []
            if not read:
                read = self._counted(tokens, request.copied())
            for n in range(self._last):
                sparse = self._runner.step(tokens[:, n : n + 1], request)[:, 0]
                found.append(_compared(self._runner.logits(dense[:, n]), sparse))
            kl, accepted, equal = (torch.stack(x, 1) for x in zip(*found, strict=True))
            values["kl"] += [_rounded(row) for row in kl.tolist()]
            values["accepted"] += [_rounded(row) for row in accepted.tolist()]
            same.append(float(equal.float().mean()) * len(equal))
        return {**values, "top1": sum(same) / len(values["kl"]), "read": read}

    def _counted(self, tokens: Tensor, request: Request) -> dict[str, float]:
        """Bytes a token by kind, mean over the first steps."""
        with self._runner.counted(request) as traffic:
            for n in range(COUNTED):
                self._runner.step(tokens[:, n : n + 1], request)
        return {kind: count / (COUNTED * len(tokens)) for kind, count in traffic.read.items()}


class StepsCell:
    """Times of decode steps of `batch` requests, each with a passage of the reference text before it."""

    def __init__(self, runner: DecodeRunner, prompter: Prompter, length: int, batch: int) -> None:
        self._runner, self._timed = runner, TIMED if runner.device.type == "cuda" else TIMED // 2
        new = WARM + self._timed + 1
        rows = [prompter.text(length, i, batch) for i in range(batch)]
        ids = torch.tensor(rows, device=runner.device)
        self._token, self._prompt = ids[:, -new : -new + 1], runner.prefill(ids[:, :-new], new)

    def measure(self, plan: Plan) -> Values:
        """Milliseconds a step, which is a token of each request: "ms" by the clock, of calls
        one after the other; "graph_ms" of the CUDA graph alone.

        Raises:
            RuntimeError: on a GPU, the steps were not replayed; the message has the report.
        """
        runner, request = self._runner, self._prompt.copied()
        runner.use(plan)
        torch.manual_seed(SEED)
        for _ in range(WARM):
            runner.step(self._token, request)
        before = runner.session.steps.counts()
        runner.wait()
        start = time.perf_counter()
        for _ in range(self._timed):
            runner.step(self._token, request)
        runner.wait()
        took = 1e3 * (time.perf_counter() - start) / self._timed
        after = runner.session.steps.counts()
        how = REPLAYED if runner.device.type == "cuda" else FIXED
        if after.get(how, 0) - before.get(how, 0) != self._timed:
            raise RuntimeError(f"steps were not {how}: {runner.session.report}")
        graphs = runner.replays(request)
        return {"ms": took, **({"graph_ms": _graph_ms(graphs[-1])} if graphs else {})}


def _graph_ms(replay: Any) -> float:
    from tsa_compile.tools.bench.timing import median_ms

    return median_ms(replay.graph.replay)


def _compared(dense: Tensor, sparse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(KL(dense || sparse), acceptance, is the top token the same) of each row of logits `[B, vocabulary]`."""
    return divergence(dense, sparse), acceptance(dense, sparse), dense.argmax(-1) == sparse.argmax(-1)


def _rounded(values: list[float]) -> list[float]:
    return [float(f"{x:.4g}") for x in values]
