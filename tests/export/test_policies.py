"""What the exported node cannot express is refused by the name of the option."""

import pytest
import torch

import tsa_compile as tsa
from tests.export.test_aoti import Block
from tsa_compile.export.common import ExportError
from tsa_compile.export.trace import trace

SETTINGS = {"coverage": 0.3, "window": 16, "min_tokens": 32}


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (tsa.TokenSparse(**SETTINGS, share="group"), r"sparse_attention\w*: TokenSparse\.share is 'group'"),
        (tsa.TokenSparse(**SETTINGS, inner=tsa.BlockSparse()), r"token_block_attention\w*: TokenSparse\.inner is a BlockSparse"),
    ],
    ids=["share", "inner"],
)
def test_options_that_exports_do_not_take(policy, message):
    with pytest.raises(ExportError, match=message):
        trace(Block(), (torch.randn(2, 100, 64),), policy=policy)


def test_another_policy_is_named():
    class Encoder(torch.nn.Module):
        def forward(self, x):
            q = x.unflatten(-1, (4, 16)).transpose(1, 2)
            return torch.nn.functional.scaled_dot_product_attention(q, q, q)

    with pytest.raises(
        ExportError, match="this export takes the policy TokenSparse, not ProbeSparse; it has no form of tsa::select_keys"
    ):
        trace(Encoder(), (torch.randn(2, 100, 64),), policy=tsa.ProbeSparse(min_keys=16))


@pytest.mark.parametrize("by", ["activations", "a fixed pattern"])
def test_a_mask_whose_hidden_rows_may_be_read_is_refused(by):
    class Hides(torch.nn.Module):
        def forward(self, x):
            q = x.unflatten(-1, (4, 16)).transpose(1, 2)
            seen = q[:, :1, None, :, 0] < 1.0 if by == "activations" else torch.arange(x.shape[1]) % 3 > 0
            causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            return torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=causal & seen)

    with pytest.raises(ExportError, match=rf"its mask hides keys by {by}.*; use Dense for it"):
        trace(Hides(), (torch.randn(2, 100, 64),), policy=tsa.TokenSparse(**SETTINGS))


def test_an_operator_of_another_policy_is_named():
    """A policy that lowers to an operator of its own: nothing else would notice before ONNX Runtime does."""
    from tsa_compile.export.fuse import refuse_other_operators

    class Selects(torch.nn.Module):
        def forward(self, q, k):
            return torch.ops.tsa.select_tokens(q, k, None, None, 0.25, 0.3, 16, 7, 32, 0)[1]

    program = torch.export.export(Selects(), (torch.randn(1, 2, 90, 16), torch.randn(1, 2, 90, 16)))
    with pytest.raises(
        ExportError,
        match=r"select_tokens\w*: this export takes the policy TokenSparse, not Mine; .* no form of tsa::select_tokens",
    ):
        refuse_other_operators(program.graph_module, ["Mine"])


@torch.no_grad()
def test_a_refused_export_leaves_the_program_as_it_was():
    """Also one that succeeds: what is rewritten is a copy, which shares the weights."""
    program = torch.export.export(Block(), (torch.randn(2, 100, 64),), strict=False)
    before, x = str(program), torch.randn(2, 100, 64)
    expected = program.module()(x)
    with pytest.raises(ExportError, match=r"TokenSparse\.share"):
        trace(program, (), policy=tsa.TokenSparse(**SETTINGS, share="group"))
    made = trace(program, (), policy=tsa.TokenSparse.paper(**SETTINGS)).program
    assert str(program) == before
    assert torch.equal(program.module()(x), expected)
    assert not torch.allclose(made.module()(x), expected, atol=1e-3)
    assert all(made.state_dict[name] is tensor for name, tensor in program.state_dict.items())


def test_a_rule_of_the_plan_that_matches_no_module_is_an_error():
    plan = tsa.Plan(rules=[("layers.7.*", "prefill", tsa.Dense())])
    with pytest.raises(ValueError, match=r"no module of the model matches 'layers\.7\.\*'"):
        trace(torch.nn.Sequential(Block()), (torch.randn(2, 100, 64),), policy=plan)
