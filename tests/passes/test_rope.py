"""The rotation of queries is read off a graph, however it is written; what is none is refused with the reason."""

from __future__ import annotations

import pytest
import torch

from tsa_compile.passes.facts.names import op_name
from tsa_compile.passes.find.rope import NotRotated, Rotations

DIM, ROWS = 16, 3
FREQUENCIES = 1e4 ** -(torch.arange(8).float() / 8)


def half(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class Attention(torch.nn.Module):
    """`rotate(q [1, H, L, D], positions [1, L], frequencies)`, then attention."""

    def __init__(self, rotate):
        super().__init__()
        self.rotate = rotate
        self.project = torch.nn.Linear(DIM, 2 * DIM)
        self.register_buffer("frequencies", FREQUENCIES.clone())

    def forward(self, x, position_ids):
        q = self.project(x).view(1, -1, 2, DIM)
        q = self.rotate(q.transpose(1, 2), position_ids, self.frequencies)
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)


def angles(position_ids, f):
    return (position_ids[..., None].float() * f)[:, None]


def llama(q, position_ids, f, factor=1.0):
    emb = torch.cat([angles(position_ids, f)] * 2, -1)
    return half(q, (emb.cos() * factor).to(q.dtype), (emb.sin() * factor).to(q.dtype))


def partial(q, position_ids, f):
    return torch.cat((llama(q[..., :8], position_ids, f[:4]), q[..., 8:]), -1)


def stacked(q, position_ids, f):
    cos, sin, (a, b) = angles(position_ids, f).cos(), angles(position_ids, f).sin(), q.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(3)


def complex_numbers(q, position_ids, f):
    turn = torch.polar(torch.ones_like(angles(position_ids, f)), angles(position_ids, f))
    return torch.view_as_real(torch.view_as_complex(q.float().unflatten(-1, (-1, 2))) * turn).flatten(3).type_as(q)


def before_transpose(q, position_ids, f):
    emb = torch.cat([position_ids[..., None].float() * f] * 2, -1)[:, :, None]
    return half(q.transpose(1, 2), emb.cos(), emb.sin()).transpose(1, 2)


CASES = {
    "half": (llama, 8, False, 1.0),
    "with a factor": (lambda *x: llama(*x, factor=1.2), 8, False, 1.2),
    "partial": (partial, 4, False, 1.0),
    "interleaved": (stacked, 8, True, 1.0),
    "complex": (complex_numbers, 8, True, 1.0),
    "before its transpose": (before_transpose, 8, False, 1.0),
}


def found_in(rotate, dtype=torch.float32, frozen=False):
    module = Attention(rotate).to(dtype)
    module.frequencies = FREQUENCIES.clone()
    module.requires_grad_(not frozen)
    program = torch.export.export(module, (torch.randn(1, ROWS, DIM, dtype=dtype), torch.arange(ROWS)[None]))
    constants = {
        s.arg.name: dict(module.named_buffers())[s.target]
        for s in program.graph_signature.input_specs
        if s.target == "frequencies"
    }
    if frozen:
        constants |= {f"p_{name.replace('.', '_')}": p for name, p in module.named_parameters()}
    graph = program.graph_module
    attention = next(n for n in graph.graph.nodes if op_name(n) == "scaled_dot_product_attention")
    return Rotations(graph, constants).of(attention.args[0])


@pytest.mark.parametrize("case", CASES)
def test_the_rotation_is_read_off(case):
    rotate, pairs, interleaved, factor = CASES[case]
    rotation, positions = found_in(rotate, frozen=case == "half")
    torch.testing.assert_close(torch.tensor(rotation.frequencies), FREQUENCIES[:pairs], rtol=2e-7, atol=1e-9)
    assert (rotation.interleaved, round(rotation.factor, 4), positions.name) == (interleaved, factor, "position_ids")


def test_frequencies_are_exact_where_the_model_rounds_to_half_precision():
    rotation, _ = found_in(llama, torch.bfloat16)
    torch.testing.assert_close(torch.tensor(rotation.frequencies), FREQUENCIES, rtol=2e-7, atol=1e-9)


REFUSED = {
    "no positions": (lambda q, p, f: q * 2, "no rotation by positions: the walk back ends at linear"),
    "added positions": (lambda q, p, f: q + angles(p, f).sin().repeat(1, 1, 1, 2), "otherwise than by a rotation of pairs"),
    "scaled by positions": (lambda q, p, f: q * angles(p, f).cos().repeat(1, 1, 1, 2), "otherwise than by a rotation of pairs"),
    "angles that do not grow evenly": (lambda q, p, f: llama(q, p * p // 64, f), "otherwise than by a rotation of pairs"),
    "a norm behind it": (lambda q, p, f: torch.nn.functional.normalize(llama(q, p, f), dim=-1), "is not linear"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_rotation_is_refused(case):
    rotate, message = REFUSED[case]
    with pytest.raises(NotRotated, match=message):
        found_in(rotate)
