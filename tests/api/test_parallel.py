"""A model whose heads are spread over two gloo ranks: what is reported is the same on both, and of all heads."""

from __future__ import annotations

import types

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import tsa_compile as tsa
from tests.ranks import run_ranks
from tsa_compile.parallel import head_group
from tsa_compile.recorder import record_kept

POLICIES = (
    tsa.TokenSparse(coverage=0.3, window=8, pool=1, min_tokens=8, min_queries=0),
    tsa.BlockSparse(alpha=0.6, last_dense=0, window=64),
)


class Attention(nn.Module):
    """4 heads of 8, or as many of them as the rank has."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32, bias=False) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).unflatten(2, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(4 * q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def spread():
    """For each policy: kept share of this rank's heads, of all heads, what `compare` says, and its report."""
    torch.manual_seed(0)
    model = Attention().eval()
    x = torch.randn(1, 640, 32) + torch.randn(1, 10, 32).repeat_interleave(64, 1)  # key blocks that differ
    by_column = dict.fromkeys("qkv", ColwiseParallel())
    parallelize_module(model, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), {**by_column, "o": RowwiseParallel()})
    found, group = [], head_group(model)
    for policy in POLICIES:
        report = tsa.compare(model, x, policy=policy, repeats=1).report
        tsa.transform(model, policy)
        with torch.no_grad(), record_kept(model) as own, record_kept(model, group) as everyone:
            model(x)
        found.append((own.shares(), everyone.shares(), [site.kept for site in report.sites], str(report)))
        tsa.restore(model)
    return found


def test_kept_shares_are_the_same_on_all_ranks():
    ranks = run_ranks(2, spread)
    assert not any(isinstance(rank, str) for rank in ranks), ranks
    for (own, everyone, reported, text), (other, *same) in zip(*ranks, strict=True):
        assert own != other
        assert everyone == reported == same[0] == same[1] == pytest.approx([(own[0] + other[0]) / 2])
        assert "kept: of the heads of all 2 ranks" in text


def unlike():
    """One rank selects more often than the other."""
    model, x = Attention().eval(), torch.randn(1, 600, 32)
    tsa.transform(model, POLICIES[0])
    with torch.no_grad(), record_kept(model, dist.group.WORLD.group_name) as kept:
        for _ in range(1 + dist.get_rank()):
            model(x)
    return kept.shares()


def test_ranks_that_ran_something_else_are_told_so():
    for found in run_ranks(2, unlike):
        assert "record_kept: ranks of group '0' differ in selections: 1 on rank 0, 2 on rank 1" in found


@pytest.mark.parametrize(
    ("names", "sizes", "tp_size", "expected"),
    [(None, (2,), 2, "all"), (None, (2,), 1, None), (("fsdp", "tp"), (2, 2), 2, "tp"), (("fsdp", "tp"), (2, 1), 1, None)],
)
def test_the_mesh_that_transformers_keeps(names, sizes, tp_size, expected):
    """Without names up to 5.17, with them later."""
    model = Attention()
    assert head_group(model) is None
    group = lambda name="all": types.SimpleNamespace(group_name=name)  # noqa: E731
    mesh = dict(ndim=len(sizes), mesh_dim_names=names, get_group=group, size=sizes.__getitem__)
    model._device_mesh, model._tp_size = types.SimpleNamespace(**mesh), tp_size
    assert head_group(model) == expected
