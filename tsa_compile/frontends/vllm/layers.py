"""Which layers of a model are sparse, and why the others are not; told once, in a table, when the engine starts."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from tsa_compile.frontends.vllm.options import READS_ALL, Options
from tsa_compile.passes.site import AttentionSite, MaskFacts
from tsa_compile.plan import Plan
from tsa_compile.policies.base import Policy
from tsa_compile.policies.why_dense import why_dense
from tsa_compile.rules import layer_number

log = logging.getLogger("vllm.tsa_compile")
MANY = 1 << 20  # stands for rows and keys that vary: a layer is asked about, not a call


class Layer(NamedTuple):
    """What was decided for one layer.

    Args:
        name: vLLM's name of it.
        path: path of the attention module, as plans have it.
        policy: of its prefill; None: dense.
        reason: why it is dense; "" if it is not.
        decode: policy of its decode steps; None: the parent's.
    """

    name: str
    path: str
    policy: Policy | None
    reason: str
    decode: Policy | None = None

    @property
    def dense(self) -> bool:
        """Is all of it the parent's?"""
        return self.policy is None and self.decode is None


def decide(attentions: Mapping[str, Any], options: Options, config: Any, device: torch.device) -> dict[str, Layer]:
    """The decision for each of vLLM's attention layers, by name.

    Args:
        attentions: vLLM's `Attention` modules by name, whose `impl` is of our backend or of another.
        options: the user's.
        config: vLLM's `VllmConfig`.
        device: where the engine runs.

    Raises:
        ValueError: a rule of the plan matches no layer.
    """
    paths = {name: name.removesuffix(".attn") for name in attentions}
    plan = options.plan
    if config.parallel_config.pipeline_parallel_size == 1:  # otherwise each process has layers of its own only
        plan = plan.bind_to(paths.values())
    engine = _reason_for_all(config)
    brought = getattr(config, "kv_transfer_config", None) is not None
    connector = "a KV connector brings keys without the sums of their pages" if brought else None
    return {name: _decide(name, paths[name], layer, plan, engine, connector, device) for name, layer in attentions.items()}


def _decide(
    name: str, path: str, layer: Any, plan: Plan, engine: str | None, connector: str | None, device: torch.device
) -> Layer:
    number = layer_number(path) or 0
    site = AttentionSite(
        module=path, index=number, layer=number, phase="prefill", form="sdpa", batch=1, heads=layer.num_heads,
        kv_heads=layer.num_kv_heads, q_len=MANY, k_len=MANY, head_dim=layer.head_size,
        v_head_dim=getattr(layer, "head_size_v", layer.head_size), dtype=layer.dtype, device=device, scale=layer.impl.scale,
        past=True, mask=MaskFacts(causal=True, window=layer.sliding_window), obstacle=engine or obstacle(layer),
    )  # fmt: skip
    policy = plan.policy_for(site)
    reason = why_dense(policy, site)
    step = dataclasses.replace(site, phase="decode", q_len=1, obstacle=site.obstacle or connector)
    decode = plan.policy_for(step)
    own = isinstance(decode, READS_ALL) or why_dense(decode, step) is not None
    return Layer(name, path, None if reason else policy, reason or "", None if own else decode)


def _reason_for_all(config: Any) -> str | None:
    """Why no layer of this engine is sparse; None: it may be."""
    parallel, model = config.parallel_config, config.model_config
    if getattr(parallel, "decode_context_parallel_size", 1) > 1 or getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        return "context parallelism: the keys of a row are spread over several GPUs"
    if getattr(model, "is_mm_prefix_lm", False):
        return "images are attended to in both directions: the mask is not causal"
    if getattr(model, "rswa_window", None):
        return "reference sliding window: already local"
    return None


def obstacle(layer: Any) -> str | None:
    """Why no policy may touch this layer of vLLM's; None: it is plain causal attention to keys of its own."""
    impl = layer.impl
    if not hasattr(impl, "tsa"):
        return f"served by another backend, {type(impl).__name__}"
    if type(layer).__name__ != "Attention":
        return f"a layer of vLLM's class {type(layer).__name__}"
    if str(getattr(layer.attn_type, "value", layer.attn_type)) != "decoder":
        return f"{layer.attn_type} attention: no causal mask"
    if getattr(layer, "kv_sharing_target_layer_name", None) or getattr(impl, "kv_sharing_target_layer_name", None):
        return "reads the keys of another layer"
    if getattr(impl, "sinks", None) is not None:
        return "attention with sinks"
    if getattr(impl, "logits_soft_cap", None):
        return f"softcap of {impl.logits_soft_cap}"
    if getattr(impl, "alibi_slopes", None) is not None:
        return "ALiBi"
    if layer.kv_cache_dtype.startswith(("fp8", "nvfp4", "int8")):
        return f"cache in {layer.kv_cache_dtype}: the kernels read keys as they were computed"
    return None


def table(layers: Iterable[Layer]) -> str:
    """Layer, sparse or dense, and why; layers that follow each other with the same answer share a line."""
    lines = []
    for (policy, reason, decode), group in itertools.groupby(layers, key=lambda x: (x.policy, x.reason, x.decode)):
        members = list(group)
        name = members[0].path if len(members) == 1 else f"{members[0].path} to {members[-1].path}"
        steps = "" if decode is None else f"; decode {_named(decode)}"
        lines.append((name, "dense" if members[0].dense else "sparse", (reason or _named(policy)) + steps))
    widths = [max(len(line[i]) for line in lines) for i in (0, 1)]
    return "\n".join(f"  {name:<{widths[0]}}  {what:<{widths[1]}}  {why}" for name, what, why in lines)


def _named(policy: Any) -> str:
    """The policy with what is not at its default."""
    changed = [f for f in dataclasses.fields(policy) if getattr(policy, f.name) != f.default]
    return f"{policy.name}({', '.join(f'{f.name}={getattr(policy, f.name)!r}' for f in changed)})"


def tell(layers: dict[str, Layer], options: Options) -> None:
    """Log the table."""
    if not layers:
        return
    sparse, decoding = (
        sum(x is not None for x in given) for given in zip(*((y.policy, y.decode) for y in layers.values()), strict=True)
    )
    head = f"tsa_compile: prefill of {sparse} of {len(layers)} layers is sparse, in rows of {options.min_context} tokens or more"
    steps = f"decode of {decoding} reads pages" if decoding else "decode is the engine's own"
    (log.info if sparse or decoding else log.warning)("%s; %s.\n%s", head, steps, table(layers.values()))
