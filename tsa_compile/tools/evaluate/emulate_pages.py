"""Page indexes for decode: what is stored of 16 keys, so that a step finds the pages it should read.

Most kinds are approximate keys: a page's mass is the log-sum-exp of its logits with them. Sources: Quest (arXiv 2406.10774) for
"minmax", CompKV (2609.26300) for "variance", LOCKS (2607.24555) for "basis".
"""

from __future__ import annotations

import dataclasses
import math

import torch

from tsa_compile.kernels.common.page_basis import RANK, unpack
from tsa_compile.kernels.state.append_basis.reference import low_rank as keep_basis
from tsa_compile.tools.evaluate.emulate_attention import scores

Tensor = torch.Tensor
PAGE = 16  # keys
KINDS = ("exact", "mean", "variance", "unbiased_variance", "norm_std", "prerope", "unbiased", "minmax", "basis", "kept_basis")


@dataclasses.dataclass(frozen=True)
class Index:
    """A kind of page index.

    Args:
        kind: "exact": true masses.
            "mean": the mean key. "variance": and the variance of each coordinate. "norm_std": the mean, and half the query's norm
            times the standard deviation.
            "prerope": the mean before the rotary embedding, turned to each token's position.
            "unbiased": the mean of what is left after the head's constant key, which is turned exactly; "unbiased_variance": with
            the variance of that.
            "minmax": smallest and largest coordinates. "basis": mean and a basis of rank `rank`.
            "kept_basis": what `tsa::append_basis` keeps, of rank 8 in 4 bits, beside means in bfloat16.
        parts: means of so many equal parts of a page ("mean").
        rank: of the basis. bits: of its vectors, 0: as they are; coordinates and mean then have 8.
        first: share of the pages that this kind ranks, the best by their means, and at least twice as many as are read; others
            keep the masses that their means give. 1: it ranks all of them.
    """

    kind: str = "mean"
    parts: int = 1
    rank: int = 8
    bits: int = 0
    first: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Index.kind must be one of {KINDS}, got {self.kind!r}")
        if PAGE % self.parts:
            raise ValueError(f"Index.parts must divide {PAGE}, got {self.parts}")

    def bytes_per_key(self, dim: int) -> float:
        """Read by one step for each key and KV head, in bytes; means in bfloat16 unless quantised."""
        mean = 2 * dim / PAGE
        first = 0.0 if self.first == 1.0 else mean
        return first + self.first * {
            "exact": 2.0 * dim, "mean": mean * self.parts, "variance": 2 * mean, "unbiased_variance": 2 * mean,
            "norm_std": mean + 2 / PAGE, "prerope": mean, "unbiased": mean, "minmax": 2 * mean, "basis": self._basis_bytes(dim),
            "kept_basis": (mean if self.first == 1.0 else 0.0) + RANK * (dim / 2 + PAGE + 2) / PAGE,
        }[self.kind]  # fmt: skip

    @property
    def has_means(self) -> bool:
        """Does it read every page's mean key?"""
        return self.first < 1.0 or self.kind not in ("exact", "minmax")

    def _basis_bytes(self, dim: int) -> float:
        own_mean = self.first == 1.0  # with a first stage the means are read before
        if self.bits == 0:
            return (2 * dim * (self.rank + own_mean) + 2 * PAGE * self.rank) / PAGE
        scales = 2 * (self.rank + 1 + own_mean)
        return (self.bits * dim * self.rank / 8 + PAGE * self.rank + own_mean * dim + scales) / PAGE


Rotation = tuple[Tensor, Tensor]  # cos, sin [L, D]
Stored = dict[str, Tensor]  # "keys" [Hk, P * parts, D], and what the kind adds, pages in dimension 1


def build(index: Index, k: Tensor, rotation: Rotation | None, bias: Tensor | None) -> Stored:
    """The index of whole pages of keys k [Hk, P * 16, D]; `bias` [Hk, D]: the head's constant key before rotation."""
    k = k.float()
    pages = k.unflatten(1, (-1, PAGE))
    kind = index.kind
    if kind == "exact":
        return {"keys": k}
    if kind == "minmax":
        return {"low": pages.amin(2), "high": pages.amax(2)}
    if kind == "basis":
        return {"keys": low_rank(pages, index.rank, index.bits).flatten(1, 2)}
    if kind == "kept_basis":
        return {"keys": _kept(pages).flatten(1, 2)}
    if kind in ("prerope", "unbiased", "unbiased_variance"):
        return _turned(kind, k, rotation, bias)
    stored = {"keys": pages.unflatten(2, (index.parts, -1)).mean(3).flatten(1, 2)}
    if kind in ("variance", "norm_std"):
        variance = pages.var(2, correction=0)
        stored["variance"] = variance if kind == "variance" else variance.sum(-1, keepdim=True)
    return stored


def _turned(kind: str, k: Tensor, rotation: Rotation | None, bias: Tensor | None) -> Stored:
    if rotation is None or bias is None:
        raise ValueError(f"index kind {kind!r} needs a rotary embedding")
    if kind == "prerope":
        mean = rotate(k, rotation, -1).unflatten(1, (-1, PAGE)).mean(2)
        return {"keys": rotate(mean.repeat_interleave(PAGE, 1), rotation, 1)}
    constant = rotate(bias[:, None].expand_as(k), rotation, 1)
    rest = (k - constant).unflatten(1, (-1, PAGE))
    stored = {"keys": constant + rest.mean(2).repeat_interleave(PAGE, 1)}
    if kind == "unbiased_variance":
        stored["variance"] = rest.var(2, correction=0)
    return stored


def rotate(x: Tensor, rotation: Rotation, sign: int) -> Tensor:
    """Rotary embedding (halves layout) of x [..., L, D], or its inverse for sign -1."""
    cos, sin = (r.float() for r in rotation)
    a, b = x.float().chunk(2, -1)
    return x.float() * cos + sign * torch.cat((-b, a), -1) * sin


def low_rank(pages: Tensor, rank: int, bits: int = 0) -> Tensor:
    """Each page [..., 16, D] by its mean and `rank` directions; `bits` > 0: directions in `bits`, coordinates and mean in 8."""
    mean = pages.mean(-2, keepdim=True)
    centred = pages - mean
    values, vectors = torch.linalg.eigh(centred @ centred.mT)
    values, vectors = values[..., -rank:].clamp_min(0.0), vectors[..., -rank:]
    root = values.sqrt()[..., None, :]
    inverse = torch.where(root > 1e-6, 1.0 / root.clamp_min(1e-6), 0.0)
    basis, coordinates = centred.mT @ vectors * inverse, vectors * root
    if bits:
        basis, coordinates, mean = quantise(basis, bits, -2), quantise(coordinates, 8, (-2, -1)), quantise(mean, 8, -1)
    return mean + coordinates @ basis.mT


def _kept(pages: Tensor) -> Tensor:
    """Pages [..., 16, D] as a step would rebuild them."""
    found = keep_basis(pages, torch.ones(pages.shape[:-1], dtype=torch.bool, device=pages.device))
    numbers, scaled = unpack(found.basis, torch.float32), found.coords.float() * found.scales.float()[..., None]
    return pages.mean(-2, keepdim=True) + scaled.mT @ numbers


def quantise(x: Tensor, bits: int, dim: int | tuple[int, int]) -> Tensor:
    """Symmetric rounding to `bits`, one scale along `dim`."""
    top = 2 ** (bits - 1) - 1
    scale = x.abs().amax(dim, keepdim=True).clamp_min(1e-30) / top
    return (x / scale).round() * scale


def log_masses(index: Index, stored: Stored, q: Tensor, scale: float) -> Tensor:
    """Estimated log mass of each page for q [G, n, D]: [G, n, P]; `stored` without the head dimension: [P, ...]."""
    if index.kind == "minmax":
        low, high = stored["low"], stored["high"]
        best = scores(q.clamp_min(0.0), high, scale) + scores(q.clamp_max(0.0), low, scale)
        return best + math.log(PAGE)
    logits = scores(q, stored["keys"], scale)
    if index.kind in ("variance", "norm_std"):
        logits = logits + _spread(index, stored["variance"], q, scale)
    parts = {"mean": index.parts, "variance": 1, "norm_std": 1}.get(index.kind, PAGE)
    mass = logits.unflatten(-1, (-1, parts)).logsumexp(-1) + math.log(PAGE / parts)
    return mass + _spread(index, stored["variance"], q, scale) if index.kind == "unbiased_variance" else mass


def _spread(index: Index, variance: Tensor, q: Tensor, scale: float) -> Tensor:
    if index.kind == "norm_std":
        return 0.5 * scale * q.float().norm(dim=-1, keepdim=True) * variance[:, 0].sqrt() / math.sqrt(q.shape[-1])
    return scores(q.float().square(), variance, 0.5 * scale * scale)
