"""Context-parallel prefill over NCCL: two GPUs of one host, against one GPU with every row."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_routed_gpu import torchrun

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
SCRIPT = """
import torch, torch.distributed as dist
from tsa_compile.kernels import ops
from tsa_compile.kernels.common.group import default_group
from tsa_compile.kernels.common.zigzag import ZigZag
from tsa_compile.kernels.context_select import Prompt, Rule, chosen
from tsa_compile.tools.bench.tune_distributed import start
device = start()
rank, ranks, group = dist.get_rank(), dist.get_world_size(), default_group()
for dtype, dim, length, past, padded in (
    (torch.bfloat16, 128, 5000, 0, False), (torch.bfloat16, 64, 8192, 1000, False), (torch.bfloat16, 128, 3000, 0, True),
    (torch.float32, 96, 3000, 64, False),
):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, h, dim, device=device).transpose(1, 2) for h in (8, 2, 2))
    k += 3 * torch.randn(2, 2, -(-length // 64), dim, device=device).repeat_interleave(64, 2)[:, :, :length]
    q, k, v = (x.to(dtype) for x in (q[:, :, past:], k, v))
    mask = None
    if padded:
        mask = torch.ones(2, length, dtype=torch.bool, device=device)
        mask[0, :700] = False
        mask[1, 100:300] = False
    padding = (None, None, None) if mask is None else (*torch.ops.tsa.padding_range(mask), mask)
    rule = ([0.3], 128, 256, 4, 128)
    means, counts = torch.ops.tsa.key_block_means(k, *padding)
    bits = torch.ops.tsa.select_key_blocks(q, k, means, counts, *padding, 0.1, *rule)
    whole = torch.ops.tsa.key_block_attention(q, k, v, bits, None, 1, *padding, 0.1, False)[0]
    cut = ZigZag(past, length, ranks)
    rows = torch.cat([torch.arange(c.start, c.stop, device=device) for c in cut.of(rank)])
    seen = torch.cat([torch.arange(past, device=device), rows])
    own = q[:, :, rows - past], k[:, :, seen], v[:, :, seen], None if mask is None else mask[:, seen].contiguous()
    out = torch.ops.tsa.context_parallel_attention(*own, 0.1, *rule, "head", True, group)
    torch.testing.assert_close(out, whole[:, :, rows - past], rtol=2e-2, atol=2e-2)
    prompt = Prompt(cut, rank, group, *padding)
    lists = chosen(prompt, own[0], own[1], Rule(0.1, (0.3,), *rule[1:], "head", True))
    for (_, chunk), found in zip(prompt.own, lists, strict=True):
        first = chunk.start // 128 - past // 128
        assert torch.equal(found, bits[:, :, first : first + found.shape[2], : found.shape[3]]), (dtype, length)
print("alike", flush=True)
dist.destroy_process_group()
"""


def test_blocks_and_output(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    assert torchrun(tmp_path / "script.py").count("alike") == 2
