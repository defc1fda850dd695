"""Queries, keys and values with the kinds of heads that long prompts show, on which selection can be compared.

Each KV head has a kind: attention sinks with values near zero, local decay by RoPE's fast pairs, one heavy token in 128, topics
in pieces of some 600 tokens that attend to their like, and a background. Amplitudes are found so that each part has the kind's
share of the attention mass at mid sequence. Eight needles are single keys to which a few rows, some among the last 128, give most
of their mass. The seed fixes everything, so numbers of different implementations can be compared.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

Tensor = torch.Tensor
#: shares of the attention mass at mid sequence: sinks, local, heavy, topic, background
KINDS = {
    "local": (0.46, 0.42, 0.05, 0.05, 0.02),
    "vertical": (0.32, 0.15, 0.40, 0.10, 0.03),
    "topic": (0.27, 0.15, 0.10, 0.44, 0.04),
    "retrieval": (0.52, 0.22, 0.12, 0.11, 0.03),
    "diffuse": (0.20, 0.20, 0.15, 0.30, 0.15),
}
LAYOUT = ("local", "local", "vertical", "vertical", "topic", "topic", "retrieval", "diffuse")
LOOKING = ("vertical", "retrieval")  # kinds whose heads look for needles
TOPICS, NEEDLES, SIGMA = 16, 8, 0.7
SINKS = (1.0, 0.8, 0.75, 0.75)


class Text(NamedTuple):
    """What all heads share: which topic each token is of, where needles lie, which rows look for which."""

    length: int
    topic: Tensor  # [L]
    at: Tensor  # [NEEDLES]
    rows: list[tuple[int, int, int]]  # first row, rows, needle

    @property
    def needle_rows(self) -> Tensor:
        return torch.cat([torch.arange(s, s + w) for s, w, _ in self.rows]).to(self.topic.device)


class Head(NamedTuple):
    """One KV head's directions, all in the slow pairs of RoPE but `shared`, and its heavy tokens."""

    kind: str
    shared: Tensor
    sink: Tensor
    heavy: Tensor
    topics: Tensor
    needles: Tensor
    chosen: Tensor  # bool [L]
    weight: Tensor


class Rope(NamedTuple):
    """Which pairs of a head's dimensions turn fast, and which slowly; and how fast."""

    dim: int
    frequencies: Tensor

    @property
    def pairs(self) -> int:
        return self.dim // 2

    @property
    def fast(self) -> int:
        return self.pairs * 5 // 8

    @property
    def slow(self) -> int:
        return self.pairs * 3 // 4

    @property
    def content(self) -> int:
        return 2 * (self.pairs - self.slow)

    def place(self, x: Tensor) -> Tensor:
        """[..., content] -> [..., dim]: to the slow pairs."""
        out = torch.zeros(*x.shape[:-1], self.dim, device=x.device)
        out[..., self.slow : self.pairs], out[..., self.pairs + self.slow :] = x.chunk(2, -1)
        return out

    def turn(self, x: Tensor) -> Tensor:
        """Rows [L, dim] turned by their positions."""
        angle = torch.arange(x.shape[0], device=x.device, dtype=torch.float32)[:, None] * self.frequencies
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def llama31_frequencies(dim: int, device: str, base: float = 500_000.0) -> Tensor:
    """RoPE frequencies of Llama 3.1: long waves are stretched eight times."""
    f = base ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    smooth = ((8192 / (2 * math.pi / f) - 1) / 3).clamp(0, 1)
    return f * smooth + f / 8 * (1 - smooth)


def make_text(length: int, device: str, generator: torch.Generator) -> Text:
    ends, place = [], 0
    while place < length:
        place += 64 + int(torch.empty(1).exponential_(1 / 536, generator=generator))
        ends.append(place)
    segment = torch.bucketize(torch.arange(length, device=device), torch.tensor(ends, device=device), right=True)
    topic = torch.randint(0, TOPICS, (len(ends) + 1,), generator=generator).to(device)[segment]
    at = (torch.rand(NEEDLES, generator=generator) * 0.75 * length).long() + length // 50
    rows = [(length - 120 + 30 * n, 12, n) for n in range(4)]
    rows += [(int(length * (0.86 + 0.03 * n)), 12, 4 + n) for n in range(4)]
    return Text(length, topic, at.to(device), [(s, w, n) for s, w, n in rows if s >= 0 and s + w <= length])


def make_head(kind: str, rope: Rope, length: int, g: torch.Generator) -> Head:
    device = rope.frequencies.device
    randn = lambda *s: torch.randn(*s, device=device, generator=g)  # noqa: E731
    unit = lambda x: x / x.norm(dim=-1, keepdim=True)  # noqa: E731
    phase = randn(rope.fast) * 6.28
    shared = torch.zeros(rope.dim, device=device)
    shared[: rope.fast], shared[rope.pairs : rope.pairs + rope.fast] = phase.cos(), phase.sin()
    basis = torch.linalg.qr(randn(rope.content, rope.content))[0]
    topics = unit(randn(TOPICS, rope.content - 2) @ basis[2:])
    needles = unit(randn(NEEDLES, rope.content - 2) @ basis[2:])
    chosen = torch.rand(length, device=device, generator=g) < 1 / 128
    chosen[:4] = False
    weight = (1 + 0.1 * randn(length)) * chosen
    return Head(kind, unit(shared), basis[0], basis[1], topics, needles, chosen, weight)


class Amplitudes(NamedTuple):
    sink: float
    local: float
    heavy: float
    topic: float


def size(amplitude: float, dim: int) -> float:
    return float((max(amplitude, 0.0) * dim**0.5) ** 0.5)


def key_parts(head: Head, text: Text, a: Amplitudes, noise: Tensor) -> tuple[Tensor, Tensor]:
    """(content, what RoPE's fast pairs turn) of all keys, before RoPE."""
    dim = noise.shape[1]
    content = size(a.topic, dim) * head.topics[text.topic] + (size(a.heavy, dim) * head.weight)[:, None] * head.heavy
    content[:4] = size(a.sink, dim) * torch.tensor(SINKS, device=noise.device)[:, None] * head.sink
    return content, noise + size(a.local, dim) * head.shared


def query_parts(head: Head, text: Text, a: Amplitudes, rows: Tensor, noise: Tensor, wobble: list[float]) -> tuple[Tensor, Tensor]:
    """As `key_parts`, of the queries `rows`."""
    dim = noise.shape[1]
    content = size(a.sink, dim) * wobble[0] * head.sink + size(a.heavy, dim) * wobble[1] * head.heavy
    content = content + size(a.topic, dim) * wobble[2] * head.topics[text.topic[rows]]
    return content, noise + size(a.local, dim) * wobble[3] * head.shared


def find_amplitudes(head: Head, text: Text, rope: Rope, k_noise: Tensor, q_noise: Tensor) -> tuple[Amplitudes, float]:
    """(amplitudes by which the parts' masses at mid sequence come to the kind's shares; the rows' mean log-sum-exp)."""
    length, shares, total = text.length, KINDS[head.kind], 0.0
    rows = torch.arange(length // 2 - 16, length // 2 + 16, device=k_noise.device)
    key = torch.arange(length, device=k_noise.device)
    found = [10.0, 10.0, 6.0, 4.0]
    for _ in range(16):
        a = Amplitudes(*found)
        kc, kn = key_parts(head, text, a, k_noise)
        qc, qn = query_parts(head, text, a, rows, q_noise[rows], [1.0] * 4)
        queries = torch.zeros(length, rope.dim, device=key.device).index_copy(0, rows, qn + rope.place(qc))
        logits = rope.turn(queries)[rows] @ rope.turn(kn + rope.place(kc)).T / rope.dim**0.5
        logits = logits.masked_fill(key > rows[:, None], -torch.inf)
        mass, total = logits.softmax(-1), logits.logsumexp(-1).mean().item()
        rest_of_keys = ~head.chosen & (key >= 4)
        close = (rows[:, None] - key < min(1024, length // 8)) & rest_of_keys
        alike = (text.topic[rows][:, None] == text.topic) & ~close & rest_of_keys
        sums = (mass[:, :4].sum(-1), (mass * close).sum(-1), mass[:, head.chosen].sum(-1), (mass * alike).sum(-1))
        parts = [x.mean().item() for x in sums]
        rest = max(1 - sum(parts), 1e-6)
        for n in range(4):
            step = math.log(shares[n] / shares[4]) - math.log(max(parts[n], 1e-6) / rest)
            found[n] = min(max(found[n] + 0.6 * min(max(step, -3), 3), 0.0), 24.0)
    return Amplitudes(*found), total


def make_values(head: Head, text: Text, dim: int, g: torch.Generator) -> Tensor:
    device, length = text.topic.device, text.length
    randn = lambda *s: torch.randn(*s, device=device, generator=g)  # noqa: E731
    v = 0.5 * randn(dim) + 0.7 * randn(TOPICS, dim)[text.topic] + 0.7 * randn(length, dim)
    v = torch.where(head.chosen[:, None], 1.5 * randn(length, dim), v)
    v[:4] *= 0.05
    v[text.at] = 2 * randn(NEEDLES, dim)
    return v


def structured_heads(
    length: int, heads: int = 32, kv_heads: int = 8, dim: int = 128, device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16, seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Q `[1, H, L, D]`, K and V `[1, Hk, L, D]` as views of `[1, L, H, D]`, and the rows that look for a needle."""
    g = torch.Generator(device).manual_seed(seed)
    text = make_text(length, device, torch.Generator().manual_seed(seed + 1))
    rope, group = Rope(dim, llama31_frequencies(dim, device)), heads // kv_heads
    q = torch.empty(length, heads, dim, device=device, dtype=dtype)
    k, v = (torch.empty(length, kv_heads, dim, device=device, dtype=dtype) for _ in range(2))
    every = torch.arange(length, device=device)
    for h in range(kv_heads):
        head = make_head(LAYOUT[h * len(LAYOUT) // kv_heads], rope, length, g)
        k_noise, *q_noise = (SIGMA * torch.randn(length, dim, device=device, generator=g) for _ in range(1 + group))
        a, total = find_amplitudes(head, text, rope, k_noise, q_noise[0])
        needle = size(total + math.log(4), dim)
        content, turned = key_parts(head, text, a, k_noise)
        if head.kind in LOOKING:
            content[text.at] = needle * head.needles
        k[:, h] = rope.turn(turned + rope.place(content)).to(dtype)
        for n in range(group):
            wobble = (1 + 0.05 * torch.randn(4, device=device, generator=g)).tolist()
            content, turned = query_parts(head, text, a, every, q_noise[n], wobble)
            if head.kind in LOOKING:
                for start, width, m in text.rows:
                    content[start : start + width] += needle * head.needles[m]
            q[:, h * group + n] = rope.turn(turned + rope.place(content)).to(dtype)
        v[:, h] = make_values(head, text, dim, g).to(dtype)
    heads_first = lambda x: x.unsqueeze(0).transpose(1, 2)  # noqa: E731
    return heads_first(q), heads_first(k), heads_first(v), text.needle_rows
