"""Recognise attention written out: `softmax(scale * q k^T + mask) v`, in the forms that models use."""

from __future__ import annotations

import dataclasses

import torch.fx as fx

from tsa_compile.passes.find_sdpa import Match
from tsa_compile.passes.mask_transfer import HIDDEN_BELOW, MaskReader
from tsa_compile.passes.mask_values import Affine
from tsa_compile.passes.graph_names import (
    SHAPE_READERS,
    argument,
    is_tensor,
    name_of,
    shape_of,
    skip_casts,
    value_of,
)


@dataclasses.dataclass
class _Scores:
    """What lies between q k^T and the softmax, read from the softmax backwards."""

    reader: MaskReader
    scale: float = 1.0
    masks: list[tuple[str, fx.Node]] = dataclasses.field(default_factory=list)
    softcap: bool = False


def is_attention_softmax(node: fx.Node) -> bool:
    """A softmax over the last dim of a tensor of 3 or 4 dims."""
    if name_of(node) != "softmax" or not is_tensor(node) or len(shape_of(node)) not in (3, 4):
        return False
    return argument(node, 1, "dim") in (-1, len(shape_of(node)) - 1)


def match_manual(softmax: fx.Node, reader: MaskReader) -> Match | None:
    """The attention around a softmax; None if the softmax is none of an attention this pass understands."""
    if not is_attention_softmax(softmax) or len(shape_of(softmax)) != 4:
        return None
    scores = _Scores(reader)
    product = _read_scores(softmax.args[0], scores)
    if product is None:
        return None
    q, k_transposed = product.args[:2]
    k = _transposed(k_transposed)
    if k is None or len(shape_of(q)) != 4:
        return None
    output, obstacle = _output(softmax)
    if output is None:
        return None
    if _written_on_the_way(output, product, reader):
        return None
    if scores.softcap:
        obstacle = "scores are soft-capped"
    return Match(output, "manual", q, k, output.args[1], scores.scale, tuple(scores.masks), False, obstacle, product)


def _written_on_the_way(output: fx.Node, product: fx.Node, reader: MaskReader) -> bool:
    """Whether scores or weights are written in place by a node that is not itself on the way from product to output."""
    chain, todo = {output}, [output.args[0]]
    while todo:
        x = todo.pop()
        if isinstance(x, fx.Node) and x not in chain:
            chain.add(x)
            todo += x.all_input_nodes if x is not product else []
    return any(w not in chain for x in chain if x not in (output, product) for w in reader.writes.of(x))


def _read_scores(x: fx.Node, scores: _Scores) -> fx.Node | None:
    """Walk from the softmax's input to the matmul, collecting scale and masks; None if something else is on the way."""
    while True:
        x = skip_casts(x)
        name = name_of(x)
        if name == "matmul":
            return x
        if name == "add":
            step = _read_add(x, scores)
        elif name == "where":
            step = _read_where(x, scores)
        elif name == "masked_fill":
            step = _read_masked_fill(x, scores)
        elif name in ("mul", "div"):
            step = _read_factor(x, name, scores)
        else:
            return None
        if step is None:
            return None
        x = step


def _read_add(x: fx.Node, scores: _Scores) -> fx.Node | None:
    if x.kwargs.get("alpha", 1) != 1:
        return None
    a, b = x.args[:2]
    for score, mask in ((a, b), (b, a)):
        if is_tensor(score) and is_tensor(mask) and _leads_to_matmul(score):
            # What is added before a factor is scaled by it; a mask of 0 and -inf does not mind a positive one.
            scores.masks.append(("add", mask))
            return score
    return None


def _read_where(x: fx.Node, scores: _Scores) -> fx.Node | None:
    if len(x.args) != 3:
        return None
    cond, yes, no = x.args
    if _hides(no, scores.reader) and is_tensor(yes) and _leads_to_matmul(yes):
        scores.masks.append(("bool", cond))
        return yes
    if _hides(yes, scores.reader) and is_tensor(no) and _leads_to_matmul(no):
        scores.masks.append(("hidden", cond))
        return no
    return None


def _read_masked_fill(x: fx.Node, scores: _Scores) -> fx.Node | None:
    cond, fill = argument(x, 1, "mask"), argument(x, 2, "value")
    if not _hides(fill, scores.reader):
        return None
    scores.masks.append(("hidden", cond))
    return x.args[0]


def _hides(x: object, reader: MaskReader) -> bool:
    """Whether a value put in place of a score hides the key: a constant of at most -1e4."""
    value = reader.value(x)
    if not isinstance(value, Affine) or value.terms:
        return False
    return bool(value.const <= HIDDEN_BELOW)


def _read_factor(x: fx.Node, name: str, scores: _Scores) -> fx.Node | None:
    a, b = x.args[:2]
    if name == "mul" and isinstance(a, (int, float)):
        a, b = b, a
    if not isinstance(b, (int, float)) or isinstance(b, bool) or not is_tensor(a) or b <= 0:
        return None
    inner = skip_casts(a)
    if name == "mul" and name_of(inner) == "tanh":
        scores.softcap = True
        return inner.args[0]
    scores.scale = scores.scale * b if name == "mul" else scores.scale / b
    return a


def _leads_to_matmul(x: fx.Node) -> bool:
    """Whether the scores, rather than the mask, are on this side."""
    for _ in range(16):
        x = skip_casts(x)
        name = name_of(x)
        if name == "matmul":
            return len(shape_of(x)) == 4
        if name not in ("mul", "div", "add", "tanh", "where", "masked_fill"):
            return False
        sides = [a for a in x.args if is_tensor(a) and isinstance(a, fx.Node)]
        sides = [a for a in sides if value_of(a).is_floating_point()]
        if name in ("add", "where") and len(sides) > 1:
            return any(_leads_to_matmul(a) for a in sides)
        if not sides:
            return False
        x = sides[0]
    return False


def _transposed(x: fx.Node) -> fx.Node | None:
    """k where x is k with its last two dims swapped."""
    x = skip_casts(x) if value_of(x).dtype == value_of(skip_casts(x)).dtype else x
    if name_of(x) == "transpose":
        rank = len(shape_of(x))
        dims = {argument(x, 1, "dim0", 0) % rank, argument(x, 2, "dim1", 1) % rank}
        return x.args[0] if dims == {rank - 1, rank - 2} else None
    if name_of(x) in ("mT",):
        return x.args[0]
    if name_of(x) == "getattr" and x.args[1] == "mT":
        return x.args[0]
    if name_of(x) == "permute":
        dims = x.args[1] if isinstance(x.args[1], (list, tuple)) else x.args[1:]
        return x.args[0] if [d % 4 for d in dims] == [0, 1, 3, 2] else None
    return None


def _output(softmax: fx.Node) -> tuple[fx.Node | None, str | None]:
    """(the matmul with v, an obstacle): follows casts and inactive dropout."""
    at, obstacle = softmax, None
    while True:
        users = [u for u in at.users if name_of(u) not in SHAPE_READERS]
        products = [u for u in users if name_of(u) == "matmul" and u.args[0] is at]
        if products:
            if len(users) > 1:
                obstacle = "attention weights are used elsewhere"
            return products[0], obstacle
        following = [u for u in users if name_of(u) in ("to", "dropout", "identity")]
        if len(following) != 1:
            return None, None
        if len(users) > 1:
            obstacle = "attention weights are used elsewhere"
        if name_of(following[0]) == "dropout" and _active(following[0]):
            obstacle = "dropout is active"
        at = following[0]


def _active(dropout: fx.Node) -> bool:
    training = argument(dropout, 2, "training", argument(dropout, 2, "train", True))
    return argument(dropout, 1, "p", 0.5) != 0 and training is not False


