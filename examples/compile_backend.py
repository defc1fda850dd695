"""As a torch.compile backend, where a pipeline compiles already: Inductor gets the rewritten graph.

python examples/compile_backend.py
"""

import torch
import torch.nn.functional as F

import tsa_compile  # noqa: F401  (an installed package is found by its entry point, without this line)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Grouped queries and a causal mask written by hand: the passes prove what it says."""
    causal = torch.arange(k.shape[2])[None, :] <= torch.arange(q.shape[2])[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal, enable_gqa=True)


q, k, v = (torch.randn(1, heads, 1024, 64) for heads in (8, 2, 2))
options = {"coverage": 0.2, "window": 64, "min_tokens": 256, "compiler": "eager"}  # leave compiler out for Inductor
sparse = torch.compile(attention, backend="tsa", fullgraph=True, options=options)
with torch.no_grad():
    error = (sparse(q, k, v) - attention(q, k, v)).norm() / attention(q, k, v).norm()
print(f"relative difference to dense attention, on noise: {error:.3f}")
