"""1,000 random calls of the prefill and decode operators on a GPU, each against the CPU reference in float64.

Kernel variants are few (head dims, dtypes, padding or none), so that little is compiled; sizes, strides, rules and data vary.
"""

from __future__ import annotations

import pytest
import torch

from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
CASES, PARTS = 1000, 10  # parts run side by side
# ||out - ref|| / ||ref||: rounding of the output, and of p before the second product, in half types
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


class Draw:
    """Random choices of one case."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def whole(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def one_of(self, *choices):
        return choices[self.whole(0, len(choices) - 1)]

    def tensor(self, batch: int, heads: int, length: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
        """Values of the dtype, in either layout."""
        x = torch.randn(batch, length, heads, dim, generator=self.generator).to(dtype).transpose(1, 2)
        return x if self.whole(0, 1) else x.contiguous()

    def mask(self, batch: int, length: int) -> torch.Tensor | None:
        """Padding on the left, on the right, anywhere, of whole rows, or none."""
        kind, at = self.one_of("none", "left", "right", "holes"), torch.arange(length)
        if kind == "none":
            return None
        real = torch.tensor([self.whole(0, length) for _ in range(batch)])[:, None]
        if kind == "holes":
            return torch.rand(batch, length, generator=self.generator) < 0.8
        return at >= length - real if kind == "left" else at < real


def operands(draw: Draw):
    dtype, dim = draw.one_of(*TOLERANCE), draw.one_of(64, 128)
    kv_heads, group, batch = draw.one_of(1, 2), draw.one_of(1, 3, 4), draw.whole(1, 3)
    k_len = draw.whole(1, 900)
    q_len = k_len if draw.whole(0, 2) else draw.whole(1, k_len)
    q = draw.tensor(batch, kv_heads * group, q_len, dim, dtype)
    k, v = (draw.tensor(batch, kv_heads, k_len, dim, dtype) for _ in range(2))
    return q, k, v, draw.mask(batch, k_len)


def on(device: str, exact: bool, *tensors):
    return [
        None if x is None else x.to(device, torch.float64) if exact and x.is_floating_point() else x.to(device) for x in tensors
    ]


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.cpu().double() - want).norm() / want.norm().clamp(min=1e-6))


def token_sparse(draw: Draw, q, k, v, mask) -> float:
    """The GPU's selection, attended on both sides: a mass within rounding of the threshold may be kept by one alone."""
    window, heavy = draw.whole(1, 40), draw.whole(0, 20)
    rule = (0.125, draw.one_of(0.0, 0.05, 0.3, 0.9), window, 7, draw.whole(max(1, heavy), 60), heavy)
    strip = (draw.one_of(0, 1, 24), draw.one_of(0, 3))
    gpu, cpu = on("cuda", False, q, k, v, mask), on("cpu", True, q, k, v, mask)
    views = [(None, None) if m is None else torch.ops.tsa.key_view(m) for m in (gpu[3], cpu[3])]
    kept = torch.ops.tsa.select_tokens(*gpu[:2], *views[0], *rule)
    engine = draw.one_of("auto", "fused")
    out, lse = torch.ops.tsa.sparse_attention(*gpu[:3], *kept, *views[0], 0.125, *strip, 0, engine, True)
    given = [x.cpu() for x in kept]
    want, want_lse = torch.ops.tsa.sparse_attention(*cpu[:3], *given, *views[1], 0.125, *strip, 0, "reference", True)
    assert torch.equal(lse.cpu() == -torch.inf, want_lse == -torch.inf)
    return error(out, want)


def key_blocks(draw: Draw, q, k, v, mask) -> float:
    rule = ([draw.one_of(0.0, 0.1, 0.6)], draw.one_of(32, 128), draw.whole(1, 300), draw.whole(0, 9), draw.one_of(0, 64))
    gpu, cpu = on("cuda", False, q, k, v, mask), on("cpu", True, q, k, v, mask)
    padding = [(None, None, None) if m is None else (*torch.ops.tsa.padding_range(m), m) for m in (gpu[3], cpu[3])]
    means = torch.ops.tsa.key_block_means(gpu[1], *padding[0])
    bits = torch.ops.tsa.select_key_blocks(*gpu[:2], *means, *padding[0], 0.125, *rule)
    out, lse = torch.ops.tsa.key_block_attention(*gpu[:3], bits, None, 1, *padding[0], 0.125, True)
    want, want_lse = torch.ops.tsa.key_block_attention(*cpu[:3], bits.cpu(), None, 1, *padding[1], 0.125, True)
    assert torch.equal(lse.cpu() == -torch.inf, want_lse == -torch.inf)
    return error(out, want)


def decode(draw: Draw, q, k, v, mask) -> float:
    q = q[:, :, -draw.whole(1, min(16, q.shape[2])) :]
    gpu, cpu = on("cuda", False, q, k, v, mask), on("cpu", True, q, k, v, mask)
    out, lse, _ = torch.ops.tsa.decode_attention(*gpu[:3], None, 1, None, None, gpu[3], 0.125)
    want, want_lse, _ = torch.ops.tsa.decode_attention(*cpu[:3], None, 1, None, None, cpu[3], 0.125)
    assert torch.equal(lse.cpu() == -torch.inf, want_lse == -torch.inf)
    return error(out, want)


@pytest.mark.parametrize("part", range(PARTS))
def test_random_calls_are_the_definition(part):
    wrong = []
    for seed in range(part, CASES, PARTS):
        draw = Draw(seed)
        run, x = draw.one_of(token_sparse, key_blocks, decode), operands(draw)
        try:
            size = run(draw, *x)
        except Exception as failure:  # every case is run, and each failure listed
            wrong.append((seed, run.__name__, repr(failure)[:200]))
            continue
        if not size < TOLERANCE[x[0].dtype]:
            wrong.append((seed, run.__name__, size, [tuple(t.shape) for t in x[:2]]))
    assert not wrong, f"{len(wrong)} of {CASES // PARTS}: {wrong[:10]}"
