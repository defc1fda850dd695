"""What no kernel runs is dense with a reason, seen while a model is traced: dtypes, head dims, devices."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

import tsa_compile as tsa
from tests.passes.graphs import KEEP_ALL, by_dynamo
from tsa_compile.kernels.types import Operands
from tsa_compile.passes.site import AttentionSite, MaskFacts
from tsa_compile.policies.why_dense import why_dense


def causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def traced_reasons(dtype=torch.float32, head_dim=16, v_head_dim=16, device="cuda"):
    """Why the site is dense where the example tensors are fake, as on a machine without the device."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, v = (torch.empty(1, 2, 40, d, dtype=dtype, device=device) for d in (head_dim, v_head_dim))
        report = tsa.explain(Attention(), q, q, v)
    return [site.reason for site in report.sites]


class Attention(torch.nn.Module):
    def forward(self, q, k, v):
        return causal(q, k, v)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"dtype": torch.bfloat16}, ""),
        ({"dtype": torch.float64}, "float64 on cuda: the kernels compute in float16, bfloat16 and float32"),
        ({"dtype": torch.float64, "device": "cpu"}, ""),
        ({"head_dim": 300}, "head dim 300 is above 256"),
        ({"v_head_dim": 300}, "value head dim 300 is above 256"),
    ],
)
def test_a_traced_site_says_why_it_is_dense(changes, reason):
    assert traced_reasons(**changes) == [reason]


@pytest.mark.parametrize("policy", [KEEP_ALL, tsa.ProbeSparse()], ids=lambda p: p.name)
def test_a_value_head_dim_that_no_kernel_takes(policy):
    def attention(q, v):
        return F.scaled_dot_product_attention(q, q, v, is_causal=policy is KEEP_ALL)

    outcome = by_dynamo(attention, torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 300), policy=policy)
    assert outcome.reasons == ["value head dim 300 is above 256"]


def reason_on(device: str) -> str | None:
    """Why a site of this device is dense; no tensor of the device is needed."""
    x = torch.randn(1, 2, 40, 16)
    site = AttentionSite.of(Operands(x, x, x), MaskFacts(causal=True))
    object.__setattr__(site, "device", torch.device(device))
    return why_dense(KEEP_ALL, site)


@pytest.mark.parametrize("device", ["mps", "xpu", "privateuseone"])
def test_devices_without_kernels(device):
    assert reason_on(device) == f"device {device}: the operators run on cpu and cuda"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_devices_with_them(device):
    assert reason_on(device) is None


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as this process would see it: compute capability 9.0, CUDA, Triton there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    return monkeypatch


def test_a_gpu_that_has_kernels(gpu):
    assert reason_on("cuda") is None


def test_an_old_gpu(gpu):
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert reason_on("cuda") == "compute capability 7.5: the kernels need 8.0"


def test_rocm(gpu):
    """It calls itself CUDA, and gfx90a says capability 9.0."""
    gpu.setattr(torch.version, "hip", "6.2")
    assert reason_on("cuda") == "ROCm: the kernels are for NVIDIA GPUs"


def test_no_triton(gpu):
    gpu.setitem(sys.modules, "triton", None)
    assert reason_on("cuda") == "Triton is not installed: the kernels need it on cuda"
