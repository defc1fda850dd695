"""`tsa-compile bench diffusion`: a block's denoising steps with remembered keys beside dense ones, checked before they are timed.

Attention alone, going round over as many layers' buffers as an 8B model has, so that L2 does not help; then whole steps of a
random model of that shape. All times are from CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from tsa_compile.generate.block_cache import BlockCache, Layer
from tsa_compile.kernels.attend.keys.reference import key_attention_reference
from tsa_compile.kernels.types import Keys, Operands
from tsa_compile.plan import Plan, as_plan
from tsa_compile.tools.bench.diffusion_cases import DiffusionCase, DiffusionRow
from tsa_compile.tools.bench.timing import graph_ms
from tsa_compile.tools.diffusion.model import BlockLM

Tensor = torch.Tensor
TOLERANCE = 1e-2  # relative error in bf16
HELD = 0.995  # of the mass of the best keys: rounding may swap those at the end of a list


def bench_diffusion(case: DiffusionCase, model: BlockLM | None, repeats: int = 9, device: str = "cuda") -> DiffusionRow:
    """Check, then time, one case.

    Args:
        model: of `case.sizes`, on the device; None: attention alone.

    Raises:
        RuntimeError: a result is wrong; nothing is timed then.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    layers = [_buffers(case, device, dtype) for _ in range(case.layers - case.dense_layers)]
    error, held = check(case, layers[0])
    attention = time_attention(case, layers, repeats)
    del layers
    return DiffusionRow(case, attention, {} if model is None else time_model(case, model, repeats), error, held)


def _buffers(case: DiffusionCase, device: str, dtype: torch.dtype) -> Operands:
    def normal(heads: int, length: int) -> Tensor:
        return torch.empty(case.batch, heads, length, case.dim, dtype=dtype, device=device).normal_()

    length = case.prefix + case.block
    return Operands(normal(case.heads, case.block), normal(case.kv_heads, length), normal(case.kv_heads, length))


def select(case: DiffusionCase, x: Operands) -> Keys:
    """What a first step remembers."""
    return Keys(*torch.ops.tsa.remember_keys(x.q, x.k, case.scale, case.block, min(case.keys, case.prefix)))


def check(case: DiffusionCase, x: Operands) -> tuple[float, float]:
    """(relative error of a later step, share of the best keys' mass that its list holds).

    Raises:
        RuntimeError: the error is above TOLERANCE, or the share below HELD.
    """
    keys = select(case, x)
    got = torch.ops.tsa.key_attention(x.q, x.k, x.v, *keys, case.scale)[0]
    errors, shares = [], []
    for b in range(case.batch):  # float64 takes four times the memory
        one = Operands(*(t[b : b + 1].double() for t in x[:3]))
        want = key_attention_reference(one, Keys(keys.indices[b : b + 1], keys.counts[b : b + 1]), case.scale).out
        errors.append(float((got[b : b + 1].double() - want).norm() / want.norm()))
        q = x.q[b].float().unflatten(0, (case.kv_heads, -1))
        weights = (case.scale * q @ x.k[b].float()[:, None].mT).softmax(-1)[..., : case.prefix].mean((1, 2))
        count = keys.indices.shape[2] - case.block
        own = weights.gather(1, keys.indices[b, :, :count].long()).sum(1)
        shares.append(float((own / weights.topk(count).values.sum(1)).min()))
    if not (all(e < TOLERANCE for e in errors) and all(s > HELD for s in shares)):  # so that a NaN fails
        raise RuntimeError(f"{case.name}: errors {errors}, lists hold {shares} of the best keys' mass; nothing is timed")
    return max(errors), min(shares)


def time_attention(case: DiffusionCase, layers: Sequence[Operands], repeats: int) -> dict[str, float]:
    """Milliseconds of one layer's call by form."""
    lists = [select(case, x) for x in layers]

    def dense(n: int) -> object:
        return F.scaled_dot_product_attention(*layers[n][:3], scale=case.scale, enable_gqa=True)

    forms: dict[str, Callable[[int], object]] = {
        "dense": dense,
        "select": lambda n: select(case, layers[n]),
        "first": lambda n: (dense(n), select(case, layers[n])),
        "later": lambda n: torch.ops.tsa.key_attention(*layers[n][:3], *lists[n], case.scale),
    }
    return {name: graph_ms(_round(form, len(layers)), repeats) / len(layers) for name, form in forms.items()}


def _round(form: Callable[[int], object], layers: int) -> Callable[[], object]:
    return lambda: [form(n) for n in range(layers)]


@torch.no_grad()
def time_model(case: DiffusionCase, model: BlockLM, repeats: int) -> dict[str, float]:
    """Milliseconds of one call of the model by phase, over a random prefix."""
    ids = torch.randint(model.sizes.mask_id, (case.batch, case.block), device=model.embed.weight.device)
    found = {}
    cache = _random_cache(case, Plan(), model.embed.weight)
    positions = cache.positions(case.block, ids.device)

    def step(phase: str) -> Tensor:
        cache.begin(phase, case.block)
        logits = model(ids, positions, cache)
        cache.join()
        return logits

    found["dense"] = graph_ms(lambda: step("denoise_first"), repeats)
    cache.plan = as_plan(case.policy)
    found["first"] = graph_ms(lambda: step("denoise_first"), repeats)
    step("denoise_first")  # its lists, in memory that no graph owns
    found["later"] = graph_ms(lambda: step("denoise"), repeats)
    return found


def _random_cache(case: DiffusionCase, plan: Plan, like: Tensor) -> BlockCache:
    """A cache whose prefix is normal keys and values."""
    cache = BlockCache(plan, case.block, case.prefix + case.block)
    empty = like.new_empty(case.batch, case.kv_heads, 0, case.dim)
    for n in range(case.layers):
        layer = cache.layers[n] = Layer(empty, empty, cache.capacity)
        layer.k.normal_()
        layer.v.normal_()
    cache.commit(case.prefix)
    return cache
