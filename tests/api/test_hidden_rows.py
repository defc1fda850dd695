"""A row whose own key is hidden gets what dense gives it: something else of the model may read it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tsa_compile as tsa
from tests.api.tiny import KEEP_ALL, tiny_llama, token_ids

L = 40
ALL_BLOCKS = tsa.BlockSparse(alpha=0.0)
EXACT_FORMS = pytest.mark.parametrize("policy", [KEEP_ALL, ALL_BLOCKS], ids=["tokens", "blocks"])


def right_padding(*lengths: int) -> torch.Tensor:
    return torch.arange(L) < torch.tensor(lengths)[:, None]


class Mixed(nn.Module):
    """Two attentions, the first with the padding hidden; then a mean over all rows, padding included."""

    def __init__(self, mask_in_both: bool) -> None:
        super().__init__()
        self.first, self.second, self.mask_in_both = nn.Linear(32, 96), nn.Linear(32, 96), mask_in_both

    def attend(self, projection: nn.Linear, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = projection(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    def forward(self, x: torch.Tensor, pad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        x = self.attend(self.first, x, causal & pad[:, None, None])
        x = self.attend(self.second, x, causal & pad[:, None, None] if self.mask_in_both else causal)
        return x, x.mean(1)


@EXACT_FORMS
@pytest.mark.parametrize("mask_in_both", [False, True])
def test_sites_with_different_masks_and_pooling(policy, mask_in_both):
    model, x, pad = Mixed(mask_in_both).eval(), torch.randn(2, L, 32), right_padding(L, 23)
    with torch.no_grad():
        expected = model(x, pad)
        actual = tsa.transform(model, policy)(x, pad)
    assert [s.replaced for s in tsa.report(model).sites] == [True, True]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@EXACT_FORMS
def test_a_span_hidden_inside_the_prompt(policy):
    model, ids, mask = tiny_llama(), token_ids(60), torch.ones(1, 60, dtype=torch.long)
    mask[0, 20:30] = 0
    args = dict(attention_mask=mask, position_ids=torch.arange(60)[None])
    with torch.no_grad():
        expected = model(ids, **args).logits
        actual = tsa.transform(model, policy)(ids, **args).logits
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_a_prompt_padded_on_the_right_goes_on_as_dense_does():
    model, ids = tiny_llama(), F.pad(token_ids(40), (0, 8))
    options = dict(attention_mask=(ids != 0).long(), max_new_tokens=5, do_sample=False)
    expected = model.generate(ids, **options)
    assert torch.equal(tsa.transform(model, KEEP_ALL).generate(ids, **options), expected)


def test_a_selection_leaves_hidden_rows_dense():
    """Their keys are all real ones before them, whatever is kept for the others."""
    policy = tsa.TokenSparse.paper(coverage=0.5, window=4, pool=1, min_tokens=4, min_queries=0)
    model, x, pad = Mixed(False).eval(), torch.randn(2, L, 32), right_padding(L, 23)
    q, k, v = model.first(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
    causal = torch.ones(L, L, dtype=torch.bool).tril()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=causal & pad[:, None, None])

    def attend(q, k, v, pad):
        mask = torch.ones(L, L, dtype=torch.bool).tril() & pad[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    compiled = torch.compile(attend, backend="tsa", options={"policy": policy.to_dict(), "compiler": "eager"})
    with torch.no_grad():
        actual = compiled(q, k, v, pad)
    hidden = ~pad
    torch.testing.assert_close(actual.transpose(1, 2)[hidden], expected.transpose(1, 2)[hidden], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(actual.transpose(1, 2)[pad], expected.transpose(1, 2)[pad], atol=1e-3)


HYBRIDS = {
    "FalconH1": dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1),
    "Jamba": dict(num_experts=2, mamba_d_state=8, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False),
    "Zamba2": dict(
        mamba_d_state=8, n_mamba_heads=2, mamba_ngroups=1, num_mem_blocks=1, layers_block_type=["hybrid", "mamba"],
        attention_hidden_size=128, attention_head_dim=32,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_mix_all_rows(name):
    """State-space layers read the rows of padding that attention left."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
    config = getattr(transformers, f"{name}Config")(vocab_size=128, pad_token_id=0, **sizes, **HYBRIDS[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    ids, mask = token_ids(L, 2), right_padding(L, 23).long()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        actual = tsa.transform(model, KEEP_ALL)(ids, attention_mask=mask, use_cache=False).logits
    assert tsa.report(model).replaced, tsa.report(model).summary()
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
