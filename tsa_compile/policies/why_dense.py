"""Which sites a policy takes, and in what words the report says why it leaves one as it is."""

from __future__ import annotations

import dataclasses
import importlib.util

import torch

from tsa_compile.kernels.checks import MAX_HEAD_DIM
from tsa_compile.kernels.edges import Edges
from tsa_compile.passes.site import VERIFY_ROWS, AttentionSite
from tsa_compile.policies.base import Policy, own_edges

_KINDS = {
    "causal": "causal mask: {policy} is for {masks} attention",
    "bidirectional": "bidirectional: no causal mask",
    "sliding window": "sliding window of {window}: already local",
}


def why_dense(policy: Policy, site: AttentionSite) -> str | None:
    """Why `site` stays as it is under `policy`; None: it is replaced. The one question that graphs and eager code ask."""
    if site.phase not in policy.phases:
        return f"{step(site)}: {policy.name} is for {' and '.join(sorted(policy.phases))}"
    if site.obstacle is not None:
        return site.obstacle
    if site.softcap and "softcap" not in policy.computes:
        return "softcap: scores go through tanh"
    if site.sinks and "sinks" not in policy.computes:
        return "attention sinks: columns that are no keys take part in the softmax"
    mask = site.mask
    if mask.unproven is not None and mask.kind not in policy.masks:
        return mask.unproven
    if mask.kind not in policy.masks:
        return _KINDS[mask.kind].format(policy=policy.name, masks=" or ".join(sorted(policy.masks)), window=mask.window)
    return policy.refuse(site) or cannot_run(site) or _too_few_rows(policy, site)


def where_it_pays(policy: Policy, site: AttentionSite, pays_from: int | None) -> tuple[AttentionSite, str | None]:
    """The site as its policy is to take it, and `why_dense`, if it is to run with `pays_from` keys and more alone.

    Args:
        policy: of the site.
        site: the site.
        pays_from: 0: with any number; None: with none.
    """
    reason = why_dense(policy, site)
    if reason is not None or pays_from == 0:
        return site, reason
    if pays_from is None:
        return site, f"dense: {policy.name} was slower at every length measured on this GPU"
    if isinstance(site.k_len, int) and site.k_len < pays_from:
        return site, f"dense below {pays_from} tokens: {policy.name} does not pay here"
    return (dataclasses.replace(site, dense_below=pays_from) if policy.by_length else site), None


def edges_of(policy: Policy, site: AttentionSite) -> Edges:
    """What each row of `site` reads for certain under `policy`, or by the model's own attention where that leaves it dense."""
    return own_edges(site) if why_dense(policy, site) is not None else policy.guaranteed(site)


def step(site: AttentionSite) -> str:
    """The phase in words, such as "decode step: one query"."""
    words = {"decode": "decode step: one query", "verify": f"verify step: {site.q_len} queries over a cache"}
    return words.get(site.phase, site.phase)


def _too_few_rows(policy: Policy, site: AttentionSite) -> str | None:
    if site.phase != "prefill" or not site.past or not site.mask.causal:
        return None
    if isinstance(site.q_len, int):
        few = site.q_len <= policy.min_queries
        return f"{site.q_len} queries over a cache: {policy.name} is for more than {policy.min_queries}" if few else None
    return None if policy.by_rows else f"queries over a cache in a number that varies, and {policy.name} is for more than a few"


def note(policy: Policy, site: AttentionSite) -> str:
    """What else the report says of a replaced site."""
    varies = site.phase == "prefill" and site.past and site.mask.causal and not isinstance(site.q_len, int)
    rows = f"dense for up to {max(policy.min_queries, VERIFY_ROWS)} queries over a cache" if varies else ""
    length = f"dense below {site.dense_below} tokens: does not pay here" if site.dense_below else ""
    return "; ".join(filter(None, (length, rows, policy.remark(site))))


def cannot_run(site: AttentionSite) -> str | None:
    """What no kernel of ours computes, on the site's device: dtype, head dims, the device itself. None: nothing."""
    for name, size in (("head dim", site.head_dim), ("value head dim", site.v_head_dim)):
        if not isinstance(size, int):
            return f"{name} {size} varies between runs"
        if size > MAX_HEAD_DIM:
            return f"{name} {size} is above {MAX_HEAD_DIM}"
    device = site.device
    if device.type in ("cpu", "meta"):
        return None
    if device.type != "cuda":
        return f"device {device.type}: the operators run on cpu and cuda"
    if site.dtype == torch.float64:
        return "float64 on cuda: the kernels compute in float16, bfloat16 and float32"
    if torch.version.hip is not None:
        return "ROCm: the kernels are for NVIDIA GPUs"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: the kernels need it on cuda"
    if torch.cuda.is_available():  # fake tensors of a traced graph may name a device that is not there
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"compute capability {major}.{minor}: the kernels need 8.0"
    return None
