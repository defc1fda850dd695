"""Pass 7: a site that stays dense loses a mask tensor that says no more than `is_causal`, or nothing.

Traced Hugging Face models mask every attention by a tensor of queries x keys. SDPA then takes slower kernels, and at 128K
tokens the mask alone has 17 GB. What was proven of the mask allows the short form, which computes the same.
"""

from __future__ import annotations

from typing import Any

import torch.fx as fx

from tsa_compile.passes.context import Context, GraphSite
from tsa_compile.passes.facts.dead_code import erase_dead
from tsa_compile.passes.facts.names import arg
from tsa_compile.passes.facts.sizes import SizeProver

_MASK, _IS_CAUSAL = (3, "attn_mask"), (5, "is_causal")  # positions in SDPA's signature


def drop_masks(context: Context) -> int:
    """Returns how many dense SDPA sites lost their mask."""
    masks = []
    for decision in context.decisions:
        at, node = decision.at, decision.at.node
        mask = arg(node, *_MASK) if at.site.form == "sdpa" else None
        if decision.reason is None or at.site.obstacle is not None or not isinstance(mask, fx.Node):
            continue
        is_causal = _short_form(at, context.facts.sizes)
        if is_causal is not None:
            _set(node, *_MASK, None)
            _set(node, *_IS_CAUSAL, is_causal)
            masks.append(mask)
    if masks:
        erase_dead(context.gm.graph, unused=masks)
        context.gm.recompile()
    return len(masks)


def _short_form(at: GraphSite, sizes: SizeProver) -> bool | None:
    """The `is_causal` that stands for the whole mask, or None if it takes more than that."""
    mask, site = at.mask, at.site
    says_more = mask.key_mask or mask.window is not None or mask.keys_used is not None or mask.rows is not None
    if mask.unproven is not None or says_more:
        return None
    if not mask.causal or (isinstance(site.q_len, int) and site.q_len == 1):  # a last query sees all keys
        return False
    # SDPA's is_causal puts the first query at the first key; ours the last at the last.
    return True if sizes.same(site.q_len, site.k_len) else None


def _set(node: fx.Node, position: int, name: str, value: Any) -> None:
    if len(node.args) > position:
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)
