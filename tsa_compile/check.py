"""How close is a sparse model to the dense one, and how much faster: both run on the same inputs, side by side."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tsa_compile import api
from tsa_compile.kernels.common.group import rank_and_size
from tsa_compile.parallel import head_group
from tsa_compile.recorder import record_kept

if TYPE_CHECKING:
    from rich.table import Table

    from tsa_compile.plan import Plan
    from tsa_compile.policies.base import Policy
    from tsa_compile.report import Report


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How close sparse predictions are to dense ones, over `predictions` positions."""

    kl: float  # mean KL(dense || sparse), in nats
    top1: float  # share of positions whose most likely token is the same
    max_abs: float  # largest difference of a logit
    predictions: int

    def __str__(self) -> str:
        return f"last {self.predictions} predictions: KL(dense || sparse) {self.kl:.4f} nats, same top token {self.top1:.0%}"


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What `compare` saw: the sites with the share of the tokens that each kept, times of one call, and closeness.

    Args:
        report: the sites; replaced ones carry their kept share, of a tensor-parallel model over all ranks.
        dense_seconds, sparse_seconds: medians of one call.
        relative_error: `||sparse - dense|| / ||dense||` of the compared output.
        predictions: closeness of the predictions; None for a model without logits.
        device: where it ran.
    """

    report: Report
    dense_seconds: float
    sparse_seconds: float
    relative_error: float
    predictions: Comparison | None
    device: str

    @property
    def speedup(self) -> float:
        return self.dense_seconds / self.sparse_seconds

    def summary(self) -> str:
        """Times and closeness, in two lines."""
        times = f"{self.dense_seconds:.4g} s dense, {self.sparse_seconds:.4g} s sparse: {self.speedup:.2f}x on {self.device}"
        close = str(self.predictions or f"relative error of the output {self.relative_error:.2e}")
        return f"one call takes {times}\n{close}"

    def to_table(self) -> Table:
        return self.report.to_table()

    def __str__(self) -> str:
        return f"{self.report}{self.summary()}"


def compare(
    model: nn.Module,
    *args: Any,
    policy: Policy | Plan | Mapping[str, Any] | None = None,
    repeats: int = 3,
    last: int = 128,
    compiler: str = "eager",
    **kwargs: Any,
) -> Measurement:
    """Run `model(*args, **kwargs)` dense and under `policy`, without gradients; the model is left as it was.

    Every rank of a tensor-parallel model must call it, and gets the same kept shares.

    Args:
        model: any module that is not transformed; its output has `logits`, `last_hidden_state`, or is a tensor.
        policy: as for `transform`.
        repeats: timed calls of each form; medians count. One more call of each warms up.
        last: positions, counted from the end, whose outputs are compared.
        compiler: as for `transform`; "inductor" compiles the dense model too, so that times compare.

    Raises:
        ValueError: `repeats` or `last` below 1, or an output that is not finite.
        TypeError: the output is none of the above.
        RuntimeError: the model is transformed already.
    """
    if repeats < 1 or last < 1:
        raise ValueError(f"repeats and last must be at least 1, got {repeats} and {last}")

    def call() -> tuple[Tensor, bool]:
        with torch.no_grad():
            return _output(model(*args, **kwargs), last)

    api.transform(model, {"policy": "Dense"}, compiler=compiler)
    try:
        (dense, has_logits), dense_seconds = call(), median_seconds(call, repeats)
    finally:
        api.restore(model)
    group = head_group(model)
    api.transform(model, policy, compiler=compiler)
    try:
        with record_kept(model, group) as kept:
            sparse, _ = call()
        report, shares = api.report(model), kept.shares()
        if len(shares) == len(report.replaced):  # a policy may select in another way
            report = report.with_kept(shares, 1 if group is None else rank_and_size(group)[1])
        sparse_seconds = median_seconds(call, repeats)
    finally:
        api.restore(model)
    error = ((sparse.double() - dense.double()).norm() / dense.double().norm()).item()
    predictions = compare_logits(dense, sparse) if has_logits else None
    return Measurement(report, dense_seconds, sparse_seconds, error, predictions, str(dense.device))


def _output(result: Any, last: int) -> tuple[Tensor, bool]:
    """(the last positions of a model's output, whether they are logits)."""
    if isinstance(result, Tensor):
        return result[:, -last:] if result.dim() == 3 else result, False
    for name in ("logits", "last_hidden_state"):
        tensor = getattr(result, name, None)
        if isinstance(tensor, Tensor):
            return tensor[:, -last:] if tensor.dim() == 3 else tensor, name == "logits"
    raise TypeError(f"compare needs an output with logits or last_hidden_state, or a tensor, got {type(result).__name__}")


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median wall-clock time of `call` in seconds, waiting for the GPU if there is one."""
    seconds = []
    for _ in range(repeats):
        _wait()
        start = time.perf_counter()
        call()
        _wait()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare_logits(dense: Tensor, sparse: Tensor) -> Comparison:
    """Compare logits `[..., vocabulary]` of the same inputs, in float64.

    Raises:
        ValueError: shapes differ, or a logit is not finite.
    """
    if dense.shape != sparse.shape:
        raise ValueError(f"logits differ in shape: dense {tuple(dense.shape)}, sparse {tuple(sparse.shape)}")
    if not (dense.isfinite().all() and sparse.isfinite().all()):
        raise ValueError("logits are not finite")
    p = dense.double().log_softmax(-1)
    q = sparse.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    same = (p.argmax(-1) == q.argmax(-1)).double()
    return Comparison(kl.mean().item(), same.mean().item(), (dense - sparse).abs().max().item(), kl.numel())
