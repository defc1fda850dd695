"""Keys and values of a block-diffusion model between calls, and the attention that reads them; its loop hands it over."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F

from tsa_compile.kernels.types import Operands
from tsa_compile.passes.site import AttentionSite, MaskFacts
from tsa_compile.plan import Plan
from tsa_compile.policies.base import Policy, call
from tsa_compile.policies.dense import Dense
from tsa_compile.policies.remembered import Remembered
from tsa_compile.policies.why_dense import why_dense

Tensor = torch.Tensor
Watch = Callable[[AttentionSite, Any], None]
DENOISING = ("denoise_first", "denoise")
OWN = ("prefill", "commit")  # the model's own attention: a clean block sees the blocks before it and itself


class Layer:
    """One layer's keys and values `[B, Hk, capacity, D]`, and what its policy remembers of the block."""

    def __init__(self, k: Tensor, v: Tensor, capacity: int) -> None:
        self.k, self.v = (x.new_empty(*x.shape[:2], capacity, x.shape[3]) for x in (k, v))
        self.state: dict[str, Any] = {}

    def write(self, k: Tensor, v: Tensor, at: int) -> tuple[Tensor, Tensor]:
        """Put rows behind the first `at`; all rows up to them, without a copy."""
        end = at + k.shape[2]
        self.k[:, :, at:end], self.v[:, :, at:end] = k, v
        return self.k[:, :, :end], self.v[:, :, :end]


@dataclasses.dataclass
class Counts:
    """Attention calls in the further steps of one block.

    Args:
        calls: all of them.
        listed: those that read a list.
        whole: those of `listed` whose list was the whole prefix, so that nothing was left out.
        reasons: why the others read everything.
    """

    calls: int = 0
    listed: int = 0
    whole: int = 0
    reasons: set[str] = dataclasses.field(default_factory=set)

    def add(self, policy: Policy, reason: str | None, prefix: int) -> None:
        self.calls += 1
        if reason is not None:
            self.reasons.add(reason)
            return
        self.listed += 1
        self.whole += isinstance(policy, Remembered) and policy.kept_of(prefix) == prefix


class BlockCache:
    """A prefix of finished blocks, and room for one that is being denoised.

    `cache(layer, q, k, v)` is the attention of the block's rows; the loop says in which phase. Rows of the block are written
    behind the prefix at each step and belong to it from `commit` on.

    Args:
        plan: its policies for "denoise_first" and "denoise".
        block: tokens of a block.
        capacity: tokens that there is room for.
        watch: called in each further step of a layer that reads a list, with the site and the list.

    Raises:
        ValueError: the plan names a policy for prefill, which block-causal attention has none for.
    """

    def __init__(self, plan: Plan, block: int, capacity: int, watch: Watch | None = None) -> None:
        named = [plan.prefill, *(rule.policy for rule in plan.rules if rule.phase == "prefill")]
        if any(policy is not None and not isinstance(policy, Dense) for policy in named):
            raise ValueError("block diffusion has no policy for prefill: its prompt is read block-causally, by dense attention")
        self.plan, self.block, self.capacity, self.watch = plan, block, capacity, watch
        self.length, self.phase = 0, "prefill"
        self.layers: dict[int, Layer] = {}
        self.counts = Counts()
        self._mask: Tensor | None = None
        self._side: torch.cuda.Stream | None = None
        self._selecting = False  # on that stream, since the last `join`

    def begin(self, phase: str, rows: int) -> None:
        """The model is about to be called on `rows` tokens behind the prefix."""
        if phase not in (*DENOISING, *OWN):
            raise ValueError(f"phase must be one of {(*DENOISING, *OWN)}, got {phase!r}")
        if self.length + rows > self.capacity:
            raise ValueError(f"{self.length} tokens and {rows} more do not fit the cache's {self.capacity}")
        self.phase, self._mask = phase, None
        self.join()
        if phase == "denoise_first":
            self.counts = Counts()
            for layer in self.layers.values():
                layer.state.clear()

    def join(self) -> None:
        """Wait, on the device, for the selections of a first step: they read the block's keys, which the next step writes."""
        if self._side is not None and self._selecting:  # a call that is recorded must not wait for one that is not
            torch.cuda.current_stream(self._side.device).wait_stream(self._side)
        self._selecting = False

    def commit(self, rows: int) -> None:
        """The rows that were written last belong to the prefix."""
        self.length += rows

    def positions(self, rows: int, device: torch.device) -> Tensor:
        """Where the next rows are: `[rows]`."""
        return torch.arange(self.length, self.length + rows, device=device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """`[B, H, n, D]`, `[B, Hk, n, D]`, `[B, Hk, n, Dv]`, q and k after RoPE -> `[B, H, n, Dv]`."""
        own = self.layers.get(layer)
        if own is None:
            own = self.layers[layer] = Layer(k, v, self.capacity)
        keys, values = own.write(k, v, self.length)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if self.phase in OWN:
            mask = self._block_causal(q, keys.shape[2])
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
        path, everything = f"layers.{layer}.self_attn", MaskFacts(causal=False)
        site = AttentionSite.of(Operands(q, keys, values), everything, scale, phase=self.phase, module=path, layer=layer)
        policy = self.plan.policy_for(site)
        reason = why_dense(policy, site)
        if self.phase == "denoise":
            self.counts.add(policy, reason, self.length)
        if reason is not None:
            return F.scaled_dot_product_attention(q, keys, values, scale=scale, enable_gqa=True)
        if self.phase == "denoise_first" and q.is_cuda and isinstance(policy, Remembered):
            self._select_aside(policy, site, own.state)
            return cast(Tensor, policy.attend(call, site, None))
        selection = policy.select(call, site, own.state)
        if self.watch is not None and self.phase == "denoise":
            self.watch(site, selection)
        return cast(Tensor, policy.attend(call, site, selection))

    def _select_aside(self, policy: Remembered, site: AttentionSite, state: dict[str, Any]) -> None:
        """The selection, which only the next step needs, on a stream of its own; `join` waits for it."""
        if self._side is None:
            self._side = torch.cuda.Stream(site.device)
        self._side.wait_stream(torch.cuda.current_stream(site.device))
        with torch.cuda.stream(self._side):
            policy.select(call, site, state)
        self._selecting = True
        site.operands.q.record_stream(self._side)

    def _block_causal(self, q: Tensor, keys: int) -> Tensor | None:
        """bool `[n, keys]`: a row sees up to the end of its block; None: all rows see everything."""
        if q.shape[2] <= self.block:
            return None
        if self._mask is None:
            at = self.length + torch.arange(q.shape[2], device=q.device)
            self._mask = torch.arange(keys, device=q.device) < ((at // self.block + 1) * self.block)[:, None]
        return self._mask
