"""How a model rotates the queries and keys of its attentions, by a trace of a few tokens."""

from __future__ import annotations

import torch
from torch import nn

from tsa_compile.dynamo import called
from tsa_compile.kernels.types import Rotation
from tsa_compile.passes.context import Context
from tsa_compile.passes.find.attention import find_attention
from tsa_compile.passes.find.rope import NotRotated
from tsa_compile.plan import Plan
from tsa_compile.policies.dense import Dense
from tsa_compile.session import Session

TOKENS = 20  # more than a verify step has


@torch.no_grad()
def rotations_of(model: nn.Module) -> dict[str, Rotation]:
    """The rotation of each attention, by its path, of a decoder of transformers; the model is left as it was.

    Raises:
        ValueError: queries or keys of an attention are not rotated by positions (RoPE), or in two ways; the message says why.
    """
    session = Session(model, Plan(prefill=Dense()))
    device = next(called(model).parameters()).device
    ids = torch.arange(TOKENS, device=device)[None]
    session(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=ids.clone(), use_cache=False)
    found: dict[str, Rotation] = {}
    for graph in session.backend.graphs:
        context = Context(graph.gm, lambda site: Dense(), graph.constants)
        find_attention(context)
        for at in context.sites:
            path = at.site.module
            try:
                (query, _), (key, _) = (context.rotations.of(x) for x in (at.match.q, at.match.k))
            except NotRotated as why:
                raise ValueError(f"{path}: queries and keys before rotation (RoPE) are not known: {why}") from why
            if query != key:
                raise ValueError(f"{path}: queries and keys are rotated in two ways, {query} and {key}")
            found[path] = query
    session.close()
    return found
