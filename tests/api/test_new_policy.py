"""A policy is one file: a frozen dataclass, here with a selection of its own, goes through every layer of the product."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tsa_compile as tsa
from tests.api.tiny import tiny_llama, token_ids
from tsa_compile.passes.site import AttentionSite
from tsa_compile.plan import as_plan
from tsa_compile.policies.base import Emit, Policy, check_int


@torch.library.custom_op("tsa::test_last_tokens", mutates_args=())
def last_tokens(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None, scale: float, width: int
) -> torch.Tensor:
    past = k.shape[2] - q.shape[2]
    row, column = torch.arange(q.shape[2])[:, None] + past, torch.arange(k.shape[2])
    allowed = (column <= row) & (column > row - width)
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale, enable_gqa=True).contiguous()


@last_tokens.register_fake
def _(q, k, v, key_mask, scale, width):
    return q.new_empty(*q.shape[:3], v.shape[3])


@dataclasses.dataclass(frozen=True)
class LastTokens(Policy):
    """Every query reads its last `width` tokens."""

    width: int = 4096

    def __post_init__(self) -> None:
        check_int(self, "width", 1)

    def refuse(self, site: AttentionSite) -> str | None:
        return None if site.head_dim <= 256 else f"head dim {site.head_dim} is above 256"

    def attend(self, emit: Emit, site: AttentionSite, selection: None) -> Any:
        x = site.operands
        return emit(torch.ops.tsa.test_last_tokens.default, x.q, x.k, x.v, x.key_mask, site.scale, self.width)


@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_it_runs_in_a_model(compiler):
    torch._dynamo.reset()
    model, ids = tiny_llama(), token_ids(40)
    local = tiny_llama()
    local.load_state_dict(model.state_dict())
    mask = torch.ones(40, 40, dtype=torch.bool).tril() & torch.ones(40, 40, dtype=torch.bool).triu(-7)
    with torch.no_grad():
        expected = local(input_ids=ids, attention_mask=mask[None, None]).logits
        actual = tsa.transform(model, LastTokens(8), compiler=compiler)(input_ids=ids).logits
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert [s.policy for s in tsa.report(model).replaced] == ["LastTokens"]


def test_it_validates_and_round_trips():
    with pytest.raises(ValueError, match=r"LastTokens\.width must be an int >= 1, got 0"):
        LastTokens(0)
    plan = tsa.Plan(LastTokens(7), rules=[(1, "prefill", tsa.Dense())])
    assert as_plan(plan.to_dict()) == plan
