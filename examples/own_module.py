"""Any nn.Module: attention is found in the traced graph, not by the class. Runs anywhere, in seconds.

python examples/own_module.py
"""

import torch
import torch.nn.functional as F
from torch import nn

import tsa_compile as tsa


class Block(nn.Module):
    """Causal self-attention as most people write it."""

    def __init__(self, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


torch.manual_seed(0)
model = nn.Sequential(*(Block() for _ in range(3))).eval()
x = torch.randn(1, 1536, 128)
policy = tsa.TokenSparse(coverage=0.3, min_tokens=256, completion=tsa.Completion(heavy=128))

print(tsa.compare(model, x, policy=policy, repeats=1))  # both forms side by side; the model is left as it was

tsa.transform(model, policy)  # from here on the model is token-sparse
with torch.no_grad():
    y = model(x)
tsa.restore(model)
