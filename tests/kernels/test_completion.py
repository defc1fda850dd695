"""The completion strip by Triton (through its interpreter on a CPU): one softmax over the union, every key in it once."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.kernels.flat import sparse_attention
from tsa_compile.kernels.attend.tokens.definition import sparse_attention_oracle

pytest.importorskip("triton")
_spec = importlib.util.spec_from_file_location("sparse_prefill_cases", Path(__file__).with_name("test_sparse_prefill.py"))
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float16: 1.5e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5}
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def check(args, strip, dtype=torch.float32):
    args = [None if x is None else x.to(DEVICE, dtype if x.is_floating_point() else x.dtype) for x in args]
    expected = sparse_attention_oracle(*(x.double() for x in args[:3]), *args[3:], 0.3, *strip, 0)
    got = sparse_attention(*args, 0.3, *strip, 0, "fused")
    assert float((got.double() - expected).norm() / expected.norm()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lists", ["head", "group"])
def test_batch_padding_groups_and_later_queries(dtype, lists):
    shape = dict(lengths=[90, 41, 1], k_len=90, q_len=50, padding="holes", per_query_head=lists == "head", heavy=6)
    check(cases.make_case(**shape), (16, 3), dtype)


@pytest.mark.parametrize("keep", [0, 0.3, 1])
def test_a_key_in_several_parts_counts_once(keep):
    """Heavy tokens that are sinks, kept, in the window, and none of these; every row again and again has them twice."""
    args = list(cases.make_case(lengths=[80, 60], k_len=80, q_len=80, heavy=6, keep=keep, padding="right"))
    args[5] = torch.tensor([0, 2, 7, 40, 58, -1], dtype=torch.int32).expand(2, 4, 6).contiguous()
    check(args, (24, 4))


@pytest.mark.parametrize("strip", [(200, 0), (0, 80), (1, 0)], ids=str)
def test_windows_and_sinks_beyond_the_row(strip):
    check(cases.make_case(lengths=[70], k_len=70, q_len=70), strip)
