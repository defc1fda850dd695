"""What a prefill does inside: where its time goes, and how much the heads of a layer keep in common."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tsa_compile.plan import Plan
from tsa_compile.recorder import around_graphs
from tsa_compile.tools.evaluate.runner import Runner

Tensor = torch.Tensor
_STAGES = {
    "select": "tsa::select_tokens",
    "sparse attention": "tsa::sparse_attention",
    "dense attention": "aten::scaled_dot_product_attention",
}


def time_split(runner: Runner, ids: Tensor, plan: Plan | None) -> dict[str, float]:
    """Seconds a sample by stage, of a second prefill of ids [B, L]: device time on a GPU, CPU time otherwise."""
    gpu = runner.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    runner.prefill(ids, plan)
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA] if gpu else [activity.CPU]) as profile:
        runner.prefill(ids, plan)
    events = profile.key_averages()
    unit = 1e-6 / ids.shape[0]
    inside = "device_time_total" if gpu else "cpu_time_total"
    split = {name: unit * sum(getattr(e, inside) for e in events if e.key == op) for name, op in _STAGES.items()}
    own = "self_device_time_total" if gpu else "self_cpu_time_total"
    kinds = torch.autograd.DeviceType.CUDA if gpu else torch.autograd.DeviceType.CPU
    total = unit * sum(getattr(e, own) for e in events if e.device_type == kinds and not e.is_user_annotation)
    return {**split, "everything else": max(total - sum(split.values()), 0.0)}


def head_overlap(runner: Runner, ids: Tensor, plan: Plan | None) -> dict[str, list[float]]:
    """Layer -> for each list of kept tokens, the share that another list of its layer keeps too, on average.

    Of the first row of ids [B, L].
    """
    with_selections = RecordSelections()
    with around_graphs(lambda: with_selections):
        layers = map(str, runner.prefill(ids, plan).kept)
    return {n: _overlap(i[0], int(c[0])) for n, (i, c) in zip(layers, with_selections.selections, strict=True)}


class RecordSelections(TorchDispatchMode):
    """Inside, keeps (indices [B, G, Lk], counts [B]) of each selection in `selections`, on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.selections: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.tsa.select_tokens.default:
            self.selections.append((out[0].cpu(), out[1].cpu()))
        return out


def _overlap(indices: Tensor, count: int) -> list[float]:
    """indices [G, Lk], the first `count` of each valid."""
    lists = indices.shape[0]
    member = torch.zeros(lists, indices.shape[1]).scatter_(1, indices[:, :count].long(), 1.0)
    common = member @ member.T / count
    shares: list[float] = ((common.sum(1) - 1.0) / max(lists - 1, 1)).tolist()
    return shares
