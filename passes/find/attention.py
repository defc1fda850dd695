"""Pass 2: find every attention of the graph and prove what its mask says. Changes nothing."""

from __future__ import annotations

import dataclasses
import re

import torch.fx as fx

from tsa_compile.passes.context import Context, GraphSite
from tsa_compile.passes.facts.mutation import writes_to
from tsa_compile.passes.facts.names import Unreadable, module_path, op_name, tensor
from tsa_compile.passes.find.flex import match_flex
from tsa_compile.passes.find.manual import match_manual
from tsa_compile.passes.find.mask_data import masks_as_data
from tsa_compile.passes.find.match import Match
from tsa_compile.passes.find.missed import missed_attention
from tsa_compile.passes.find.obstacles import obstacle_of
from tsa_compile.passes.find.own_rows import mask_of_rows
from tsa_compile.passes.find.repeat_kv import RepeatedHeads
from tsa_compile.passes.find.score_steps import SINKS
from tsa_compile.passes.find.sdpa import match_sdpa
from tsa_compile.passes.find.sinks import sinks_of
from tsa_compile.passes.prove_mask.patterns import Pattern
from tsa_compile.passes.prove_mask.prove import MaskProver
from tsa_compile.passes.site import AttentionSite, phase_of

# Attention in one operator that the passes do not read.
_OPAQUE_ATTENTION = re.compile(
    r"flex_attention|_scaled_dot_product_|multi_head_attention|_transformer_encoder_layer_fwd|flash_attn|memory_efficient_attention"
)
_FAST_PATH = "call torch.backends.mha.set_fastpath_enabled(False) and it is written out"

_SCALE_UNKNOWN = "scale is not a positive constant of the graph"


def find_attention(context: Context) -> int:
    """Fill `context.sites`; returns how many there are. What looks like attention in no known form is a warning."""
    finder = _Finder(context)
    unknown: list[str] = []
    for node in context.gm.graph.nodes:
        try:
            match = match_sdpa(node) or match_manual(node) or match_flex(node)
            if match is not None:
                context.sites.append(finder.site(match, len(context.sites)))
        except Unreadable as seen:
            unknown.append(f"{module_path(node) or 'graph'}: {seen}")
            continue
        if match is None and _OPAQUE_ATTENTION.search(op_name(node)) and not any(match_flex(user) for user in node.users):
            hint = f" ({_FAST_PATH})" if re.search("_native_multi|_encoder_layer_fwd", op_name(node)) else ""
            unknown.append(f"{module_path(node) or 'graph'}: {op_name(node)}{hint}")
    unknown += [f"{name}: inside a nested graph" for name in _nested_attention(context.gm)]
    if not (context.sites or unknown):
        unknown += missed_attention(context.gm.graph)
    context.patterns = finder.patterns()
    if unknown:
        shown = "; ".join(unknown[:3]) + ("; ..." if len(unknown) > 3 else "")
        context.warnings.append(f"{len(unknown)} attention-like operation(s) not recognised, left as they are: {shown}")
    return len(context.sites)


class _Finder:
    """Turns matches of one graph into sites."""

    def __init__(self, context: Context) -> None:
        placeholders = [n for n in context.gm.graph.nodes if n.op == "placeholder"]
        held = {n: context.constants[n.name] for n in placeholders if n.name in context.constants}
        self._facts, self._drafting = context.facts, context.drafting
        self._masks = MaskProver(context.facts, held)
        self._heads = RepeatedHeads(context.facts.sizes)

    def patterns(self) -> dict[str, Pattern]:
        """What the proofs assume of the constants that they read, by placeholder name."""
        return {node.name: pattern for node, pattern in self._masks.constants.patterns.items() if pattern is not None}

    def site(self, found: Match, index: int) -> GraphSite:
        match = self._without_repetition(found)
        obstacle = match.obstacle or obstacle_of(match, self._facts.sizes) or self._overwritten(match, found)
        if match.scale is None:
            obstacle = obstacle or _SCALE_UNKNOWN
        batch, heads, q_len, head_dim = (match.size("q", dim) for dim in "bhld")
        lengths = match.size("k", "l")
        shape = batch, heads, q_len, lengths
        mask = mask_of_rows(match, self._facts)
        if mask is None:
            mask = self._masks.prove(match.sources, shape, "h" in match.layouts.q)
        sinks = sinks_of(match, shape, self._masks, self._facts)
        if match.sinks is not None and sinks is None:
            obstacle = obstacle or f"{SINKS}, and they are not one number for each head"
        k_len = lengths if mask.keys_used is None else mask.keys_used
        past = not self._facts.sizes.same(q_len, k_len)
        if mask.unproven is not None and past:
            mask = dataclasses.replace(mask, data=masks_as_data(match, shape, self._masks, self._facts))
        unproven = mask.unproven if mask.data is None else None
        module = module_path(match.node)
        number = re.search(r"(?:^|\.)(\d+)(?=\.|$)", module)
        site = AttentionSite(
            module=module,
            index=index,
            layer=int(number.group(1)) if number else index,
            phase=phase_of(q_len, past, mask.causal or mask.data is not None, self._drafting),
            form=match.form,
            batch=batch,
            heads=heads,
            kv_heads=match.size("k", "h"),
            q_len=q_len,
            k_len=k_len,
            head_dim=head_dim,
            v_head_dim=match.size("v", "d"),
            dtype=tensor(match.node).dtype,
            device=tensor(match.q).device,
            scale=1.0 if match.scale is None else match.scale,
            past=past,
            mask=mask.facts,
            obstacle=obstacle or unproven,
            softcap=match.softcap,
            sinks=sinks is not None,
        )
        return GraphSite(match, mask, site, sinks)

    def _without_repetition(self, match: Match) -> Match:
        """With K and V as they were before their repetition for grouped queries, if both were repeated from as many heads."""
        if "h" not in match.layouts.q:
            return match
        k, k_layout = self._heads.source(match.k, match.layouts.k)
        v, v_layout = self._heads.source(match.v, match.layouts.v)
        q_heads, repeated, k_heads, v_heads = (
            tensor(x).shape[layout.index("h")]
            for x, layout in ((match.q, match.layouts.q), (match.k, match.layouts.k), (k, k_layout), (v, v_layout))
        )
        if k_heads != v_heads or not repeated or q_heads % repeated:
            return match
        return dataclasses.replace(match, k=k, v=v, layouts=dataclasses.replace(match.layouts, k=k_layout, v=v_layout))

    def _overwritten(self, match: Match, found: Match) -> str | None:
        """May an operand be written after the attention first reads it, so that reading it later is wrong?

        Args:
            match: what the rewritten site will read.
            found: what the attention reads now, K and V repeated.
        """
        operands = (match.q, match.k, match.v)
        if not any(x in self._facts.written for x in operands):
            return None
        readers = [match.reader, *(user for x in operands for user in x.users if self._leads_to(user, found))]
        first, last = min(self._facts.order[r] for r in readers), self._facts.order[match.node]
        between = [w for w in self._facts.writers if first < self._facts.order[w] < last]
        if not self._facts.aliases.of(x for w in between for x in writes_to(w)).isdisjoint(operands):
            return "an operand may be written in place while the attention is computed"
        return None

    def _leads_to(self, node: fx.Node, match: Match) -> bool:
        """Is `node` between a KV tensor and its repetition?"""
        targets = {match.k, match.v, match.node}
        stack, seen = [node], set()
        while stack:
            x = stack.pop()
            if x in targets:
                return True
            if x not in seen and self._facts.order[x] < self._facts.order[match.node]:
                seen.add(x)
                stack += x.users
        return False


def _nested_attention(gm: fx.GraphModule) -> list[str]:
    """Attention in the bodies of higher-order operators, which the passes leave alone."""
    return [
        f"{name} ({op_name(node)})"
        for name, body in gm.named_modules()
        if name and isinstance(body, fx.GraphModule)
        for node in body.graph.nodes
        if op_name(node) == "scaled_dot_product_attention" or (op_name(node) == "softmax" and _attends(node))
    ]


def _attends(softmax: fx.Node) -> bool:
    try:
        return match_manual(softmax) is not None
    except Unreadable:
        return True
