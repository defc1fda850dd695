"""Export once, serve with stock ONNX Runtime: the file carries its own body of standard operators.

python examples/export_onnx.py [FILE]
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn

import tsa_compile as tsa
from tsa_compile import export


class Attention(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def inputs(length: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(1, 4, length, 32) for _ in range(3))


path = sys.argv[1] if len(sys.argv) > 1 else "attention.onnx"
policy = tsa.TokenSparse(coverage=0.2, window=32, min_tokens=128)
length = torch.export.Dim("length", min=2, max=65536)
written = export.onnx(Attention().eval(), inputs(256), path, policy=policy, dynamic_shapes=[{2: length}] * 3)
print(f"{written.path}: attention nodes {written.nodes}")
print(export.check(path, Attention().eval(), inputs(700)))  # runs the file at another length and compares
