"""Operators on a GPU by remembered launches: Triton is asked once, and other operands after the first are computed as such."""

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import JITFunction

from tsa_compile.tools.bench.decode_cases import Buffers, DecodeCase
from tsa_compile.tools.bench.decode_forms import exact, page_forms, sampled_forms
from tsa_compile.tools.bench.host_time import prefill_forms
from tsa_compile.tools.bench.index_forms import index_forms

pytestmark = pytest.mark.gpu
RULE = ([1e-6], 128, 256, 4, 128)  # every key block, whatever the rounding of scores
PREFILL = ("BlockSparse", "BlockSparse, padded", "TokenSparse", "TokenSparse.paper")
DECODE = ("exact", "pages", "append", "pages, basis", "pages, completed", "append basis", "sampled, prop", "sampled, flash",
          "sampled, teams")  # fmt: skip


def qkv(length, device="cuda", dtype=torch.bfloat16, dim=64):
    g = torch.Generator().manual_seed(length)
    draw = lambda heads: torch.randn(1, length, heads, dim, generator=g).to(device, dtype).transpose(1, 2)  # noqa: E731
    return draw(4), draw(2), draw(2)


def attend(q, k, v):
    return torch.ops.tsa.block_sparse_attention(q, k, v, None, 1, None, None, None, 0.125, *RULE)


def check(*operands):
    """Twice, as the second launch is a remembered one."""
    want = attend(*(x.float().cpu() for x in operands))
    for _ in range(2):
        error = (attend(*operands).float().cpu() - want).norm() / want.norm()
        assert error < 2e-2, error


def decode_work():
    case = DecodeCase(1, 2048)
    x = Buffers.random(case)
    forms = {"exact": lambda x: exact(case, x), **page_forms(case, [x]), **index_forms(case, [x]), **sampled_forms(case)}
    return {name: lambda form=form: form(x) for name, form in forms.items()}


@torch.no_grad()
@pytest.mark.parametrize("form", [*PREFILL, *DECODE])
def test_triton_is_asked_once(form, monkeypatch):
    work = (prefill_forms(2048, "cuda") if form in PREFILL else decode_work())[form]
    first = work()
    monkeypatch.setattr(JITFunction, "run", lambda *_, **__: pytest.fail("Triton was asked again"))
    again = work()
    pairs = zip(first, again, strict=True) if isinstance(first, tuple) else [(first, again)]
    for one, other in pairs:
        torch.testing.assert_close(other, one, rtol=1e-2, atol=1e-2, equal_nan=True)


@torch.no_grad()
def test_other_addresses_after_the_first():
    q, k, v = qkv(600)
    check(q, k, v)
    for shift in (1, 8, 3):  # elements of 2 bytes: kernels differ by whether addresses are multiples of 16
        room = [x.new_empty(x.numel() + shift)[shift:].view(1, 600, -1, 64).transpose(1, 2) for x in (q, k, v)]
        check(*[to.copy_(x) for to, x in zip(room, (q, k, v), strict=True)])
    check(q, k, v)


@torch.no_grad()
def test_other_lengths_and_dtypes_after_the_first():
    for length in (600, 601, 128, 1000, 1, 16, 17, 600):
        check(*qkv(length))
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        check(*qkv(600, dtype=dtype))


@torch.no_grad()
def test_other_strides_after_the_first():
    """Of the same sizes: rows in order, heads in order, parts of wider rows, columns apart, one head for all."""
    q, k, v = qkv(600)
    views = {
        "rows": lambda x: x,
        "heads": lambda x: x.contiguous(),
        "wider": lambda x: torch.cat([x, x + 1], 3)[..., :64],
        "wider by 1": lambda x: torch.nn.functional.pad(x, (0, 1))[..., :64],
        "columns": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        "one head": lambda x: x[:, :1].expand(x.shape),
    }
    for view in (*views.values(), views["rows"]):
        check(view(q), view(k), view(v))
        check(q, view(k), v)


@torch.no_grad()
def test_graph_replay_on_new_contents():
    q, k, v = qkv(900)
    attend(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(q, k, v)
    for _ in range(3):
        q.normal_()
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, attend(q, k, v))


@torch.no_grad()
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_devices_in_turns():
    """The current one is the first all the time."""
    for _ in range(3):
        check(*qkv(700, "cuda:0"))
        check(*qkv(700, "cuda:1"))
