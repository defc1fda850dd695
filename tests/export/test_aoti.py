"""AOTInductor packages of rewritten models."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tsa_compile as tsa
from tsa_compile import export
from tsa_compile.export.trace import trace

PAPER = tsa.TokenSparse.paper(coverage=0.3, window=16, min_tokens=32)
SHAPES = ({0: torch.export.Dim("batch", max=8), 1: torch.export.Dim("length", max=4096)},)


class Block(nn.Module):
    """One attention with grouped heads, as a transformer layer has it."""

    causal = True

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 128), nn.Linear(64, 64)

    def forward(self, x):
        q, k, v = self.qkv(x).split((64, 32, 32), -1)
        q, k, v = (t.unflatten(-1, (-1, 16)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Encoder(Block):
    """The same without a causal mask, as a vision transformer has it."""

    causal = False


NUMBERS = {"coverage": 0.3, "window": 16, "min_tokens": 32}
POLICIES = {  # module -> its policy: options that one exported node does not express are no obstacle here
    "0": tsa.TokenSparse(**NUMBERS, completion=tsa.Completion(24, 4, 20), share="group"),
    "1": tsa.TokenSparse(**NUMBERS, completion=None, inner=tsa.BlockSparse(alpha=0.5, window=1)),
    "2": tsa.ProbeSparse(coverage=0.3, min_keys=32),
}


def test_a_package_of_every_policy_equals_eager_at_other_sizes(tmp_path):
    model, example = nn.Sequential(Block(), Block(), Encoder()).eval(), (torch.randn(2, 100, 64),)
    plan = tsa.Plan(rules=[(name, "prefill", policy) for name, policy in POLICIES.items()])
    path = export.aoti(model, example, tmp_path / "block.pt2", policy=plan, dynamic_shapes=SHAPES)
    loaded = export.load_aoti(path)
    program = export.program(model, example, policy=plan, dynamic_shapes=SHAPES)
    called = {node.target.name() for node in program.graph.nodes if "tsa" in str(node.target)}
    assert {"tsa::sparse_attention", "tsa::token_block_attention", "tsa::key_attention"} <= called
    for batch, length in [(2, 100), (3, 300), (2, 20)]:
        x = 3 * torch.randn(batch, length, 64)
        with torch.no_grad():
            actual, sparse, dense = loaded(x), program.module()(x), model(x)
        torch.testing.assert_close(actual, sparse, rtol=1e-4, atol=1e-5)
        assert (length > 48) == (not torch.allclose(actual, dense, atol=1e-4))  # short rows stay dense
    says_why = torch.__version__ >= "2.13"  # earlier ones print it
    bad = {"too large at 1, expected to be <= 4096": torch.randn(2, 4097, 64), "at 2, expected: 64": torch.randn(2, 100, 32)}
    for message, x in {**bad, "unmatched dtype": torch.randn(2, 100, 64).double()}.items():
        with pytest.raises(RuntimeError, match=message if says_why else "API call failed"):
            loaded(x)


@pytest.mark.gpu
def test_a_package_equals_eager_on_the_gpu(tmp_path):
    model, example = Block().half().cuda().eval(), (torch.randn(2, 100, 64).half().cuda(),)
    path = export.aoti(model, example, tmp_path / "block.pt2", policy=PAPER, dynamic_shapes=SHAPES)
    loaded = export.load_aoti(path)
    traced = trace(model, example, policy=PAPER, dynamic_shapes=SHAPES).program.module()
    for batch, length in [(2, 100), (3, 1000), (2, 20)]:
        x = 3 * torch.randn(batch, length, 64, device="cuda").half()
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), traced(x), rtol=1e-2, atol=1e-2)


def test_the_name_must_end_in_pt2(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.pt2"):
        export.aoti(Block(), (torch.randn(1, 60, 64),), tmp_path / "block.onnx", policy=PAPER)


def test_missing_and_damaged_packages(tmp_path):
    with pytest.raises(export.ExportError, match="no such file"):
        export.load_aoti(tmp_path / "none.pt2")
    (tmp_path / "bad.pt2").write_bytes(b"PK damaged")
    with pytest.raises(export.ExportError, match=r"bad\.pt2: not an AOTInductor package, or damaged"):
        export.load_aoti(tmp_path / "bad.pt2")


def test_nothing_to_replace_is_an_error(tmp_path):
    with pytest.raises(export.ExportError, match="no attention site was replaced"):
        export.aoti(nn.Linear(4, 4), (torch.randn(2, 4),), tmp_path / "linear.pt2", policy=PAPER)
