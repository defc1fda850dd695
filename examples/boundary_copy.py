"""Fixed blocks cannot carry a token over a boundary, however long they train; bridges can. Trains two tiny models, in seconds.

The task: repeat, at the first position of the second block, the token before it. Training reads by a mask, the trained model is
then run through `tsa.transform`, whose attention reads the same keys. Source: arXiv 2606.02680, the boundary-copy task.

python examples/boundary_copy.py
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

import tsa_compile as tsa

SYMBOLS, BLOCK, WIDTH, HEADS, LAYERS = 8, 16, 32, 2, 2


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(WIDTH), HEADS
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Token ids [batch, 2 * BLOCK] -> logits; causal unless a mask is given."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(SYMBOLS, WIDTH), nn.Embedding(2 * BLOCK, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.tokens(ids) + self.places.weight
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x)


def learn(policy: tsa.Bridge, steps: int = 120, tests: int = 2000) -> float:
    """Train under the policy's edges, transform, and return the share of right answers at the boundary."""
    torch.manual_seed(0)
    model = Model()
    mask, optimizer = policy.guaranteed(None).mask(2 * BLOCK), torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(steps):
        ids = torch.randint(SYMBOLS, (64, 2 * BLOCK))
        loss = F.cross_entropy(model(ids, mask)[:, BLOCK], ids[:, BLOCK - 1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ids = torch.randint(SYMBOLS, (tests, 2 * BLOCK))
    tsa.transform(model.eval(), policy)
    with torch.no_grad():
        right = model(ids)[:, BLOCK].argmax(-1) == ids[:, BLOCK - 1]
    assert len(tsa.report(model).replaced) == LAYERS
    return right.float().mean().item()


def most_by_chance(tests: int = 2000) -> float:
    """1 / SYMBOLS and three standard errors."""
    return 1 / SYMBOLS + 3 * math.sqrt((1 / SYMBOLS) * (1 - 1 / SYMBOLS) / tests)


if __name__ == "__main__":
    for name, policy in (("fixed blocks", tsa.Bridge(BLOCK, 0, 0)), ("bridged", tsa.Bridge(BLOCK, 4, 4))):
        found = tsa.reach(Model(), policy, 2 * BLOCK, torch.zeros(1, 2 * BLOCK, dtype=torch.long))
        print(f"{name}: {learn(policy):.1%} right (by chance up to {most_by_chance():.1%}); {found}")
