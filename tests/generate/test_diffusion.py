"""Block diffusion: the loop's phases and forwards, and what remembered keys do to a model that was trained for recall."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import tsa_compile as tsa
from tsa_compile.generate.block_cache import BlockCache
from tsa_compile.generate.diffusion import diffuse
from tsa_compile.generate.unmask import Sampling, take
from tsa_compile.kernels.types import Keys, Operands
from tsa_compile.passes.site import AttentionSite, MaskFacts
from tsa_compile.policies.base import call, from_dict
from tsa_compile.policies.why_dense import why_dense
from tsa_compile.tools.diffusion.model import BlockLM, Sizes, training_loss, training_mask
from tsa_compile.tools.diffusion.recall_task import RecallTask
from tsa_compile.tools.diffusion.train import Recall, evaluate, train

SIZES = Sizes(vocabulary=40, block=4, width=32, layers=3, heads=4, kv_heads=2, mlp=48)
FEW = tsa.Remembered("denoise_first", keys=3, dense_layers=1)


@pytest.fixture
def model():
    return BlockLM(SIZES).double().eval()


def ids(length, batch=2):
    return torch.randint(SIZES.mask_id, (batch, length))


def whole(model, tokens):
    """Logits of all tokens at once, by one block-causal mask and no cache."""
    n = tokens.shape[1]
    mask = training_mask(n, SIZES.block)[n:, n:]

    def attend(layer, q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    with torch.no_grad():
        return model(tokens, torch.arange(n), attend)


@pytest.mark.parametrize("rows", [(24,), (12, 12), (4, 16, 4)])
def test_the_cache_in_any_parts_is_the_model_without_one(model, rows):
    tokens = ids(24)
    cache, parts, at = BlockCache(tsa.Plan(), 4, 24), [], 0
    for n in rows:
        cache.begin("prefill", n)
        with torch.no_grad():
            parts.append(model(tokens[:, at : at + n], cache.positions(n, tokens.device), cache))
        cache.commit(n)
        at += n
    torch.testing.assert_close(torch.cat(parts, 1), whole(model, tokens), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="24 tokens and 4 more do not fit the cache's 24"):
        cache.begin("commit", 4)


def by_hand(model, prompt, new_tokens):
    """One token a step, without a cache: the likeliest of the most confident place."""
    end = -(-(prompt.shape[1] + new_tokens) // 4) * 4
    tokens = torch.cat([prompt, torch.full((1, end - prompt.shape[1]), SIZES.mask_id)], 1)
    for start in range(prompt.shape[1] // 4 * 4, end, 4):
        while (tokens[0, start : start + 4] == SIZES.mask_id).any():
            logits = whole(model, tokens[:, : start + 4])[0, start:].clone()
            logits[:, SIZES.mask_id] = -torch.inf
            best = logits.softmax(-1).max(-1)
            where = torch.where(tokens[0, start : start + 4] == SIZES.mask_id, best.values, -1).argmax()
            tokens[0, start + where] = best.indices[where]
    return tokens[:, : prompt.shape[1] + new_tokens]


@pytest.mark.parametrize(("length", "new_tokens"), [(8, 8), (10, 5), (3, 4), (0, 6)])
def test_dense_generation_is_that_by_hand(model, length, new_tokens):
    prompt = ids(length, 1)
    want = by_hand(model, prompt, new_tokens)
    for plan in (None, tsa.Remembered("denoise_first", keys=999, dense_layers=0), tsa.Remembered("denoise_first", ratio=1.0)):
        assert torch.equal(diffuse(model, prompt, new_tokens, mask_id=SIZES.mask_id, block=4, plan=plan).ids, want)


def test_a_half_precision_model_keeps_half_precision_keys(model):
    cache, halves = BlockCache(tsa.Plan(), 4, 8), BlockLM(SIZES).bfloat16().eval()
    cache.begin("denoise_first", 4)
    with torch.no_grad():
        assert halves(ids(4), cache.positions(4, torch.device("cpu")), cache).dtype == torch.bfloat16
    assert {x.dtype for layer in cache.layers.values() for x in (layer.k, layer.v)} == {torch.bfloat16}
    diffuse(halves, ids(12), 4, mask_id=SIZES.mask_id, block=4, plan=FEW)


def test_forwards_are_counted_by_phase(model):
    run = dict(mask_id=SIZES.mask_id, block=4)
    done = diffuse(model, ids(10), 6, **run)
    assert done.forwards == {"prefill": 1, "denoise_first": 2, "denoise": 1 + 3, "commit": 1}
    assert [b.forwards for b in done.blocks] == [2, 4]
    assert [b.prefix for b in done.blocks] == [8, 12]
    assert done.blocks[0].steps[:, :2].eq(0).all()
    assert done.blocks[1].steps.sort(1).values.tolist() == [[1, 2, 3, 4]] * 2
    assert [b.forwards for b in diffuse(model, ids(8), 8, steps=2, **run).blocks] == [2, 2]
    assert [b.forwards for b in diffuse(model, ids(8), 8, steps=3, **run).blocks] == [3, 3]
    assert [b.forwards for b in diffuse(model, ids(8), 8, threshold=1.0, **run).blocks] == [4, 4]
    sure = diffuse(model, ids(8), 8, threshold=1e-9, **run)
    assert [b.forwards for b in sure.blocks] == [1, 1]
    assert "2 blocks, 4 forwards (1 prefill, 2 denoise_first, 1 commit)" in str(sure)


def test_the_threshold_takes_what_is_sure_and_always_one():
    logits = torch.tensor([[[9.0, 0, 0], [0, 9, 0], [0, 0, 0]], [[0, 0, 0], [0, 0.1, 0], [0, 0, 0]]])
    part, masked = torch.full((2, 3), 2), torch.ones(2, 3, dtype=torch.bool)
    taken = take(part, masked, logits, Sampling(2, block=3, threshold=0.9), 1)
    assert taken.tolist() == [[True, True, False], [False, True, False]]
    assert part.tolist() == [[0, 1, 2], [2, 1, 2]]
    assert torch.equal(masked, ~taken)
    hot = take(torch.full((2, 3), 2), torch.ones(2, 3, dtype=torch.bool), logits, Sampling(2, block=3, temperature=5.0), 3)
    assert hot.all()


def test_a_threshold_takes_what_its_steps_take_at_least(model):
    run = dict(mask_id=SIZES.mask_id, block=4)
    assert [b.forwards for b in diffuse(model, ids(8), 8, steps=2, threshold=1.0, **run).blocks] == [2, 2]
    assert [b.forwards for b in diffuse(model, ids(8), 8, steps=2, threshold=1e-9, **run).blocks] == [1, 1]
    assert [Sampling(9, 8, steps=3).count(n) for n in range(3)] == [3, 3, 2]
    assert [Sampling(9, 8, steps=6, part=4).count(n) for n in range(3)] == [2, 1, 1]


def test_parts_are_filled_from_left_to_right(model):
    done = diffuse(model, ids(9), 7, mask_id=SIZES.mask_id, block=4, part=2)
    assert done.blocks[0].steps[:, 0].eq(0).all()
    assert done.blocks[0].steps[:, 1].eq(1).all()
    for steps in (done.blocks[0].steps[:, 2:] - 1, done.blocks[1].steps[:, :2], done.blocks[1].steps[:, 2:] - 2):
        assert steps.sort(1).values.tolist() == [[1, 2]] * 2
    many = diffuse(model, ids(8), 8, mask_id=SIZES.mask_id, block=4, part=2, threshold=1e-9)
    assert [b.steps.tolist() for b in many.blocks] == [[[1, 1, 2, 2]] * 2] * 2


def test_no_block_begins_once_every_row_has_ended(model):
    run = dict(mask_id=SIZES.mask_id, block=4)
    prompt = ids(10, 1)
    dense = diffuse(model, prompt, 18, **run)
    stop = int(dense.ids[0, 13])  # of the second block, or of the first one as well
    end = 12 if stop in dense.ids[0, 10:12] else 16
    done = diffuse(model, prompt.repeat(2, 1), 18, stop_id=stop, **run)
    assert torch.equal(done.ids, dense.ids[:, :end].repeat(2, 1))
    assert done.forwards.get("commit", 0) == len(done.blocks) - 1 == (end - 12) // 4
    assert diffuse(model, torch.full((2, 10), stop), 2, stop_id=stop, **run).ids.shape == (2, 12)  # a prompt's own do not count
    other = next(x for x in (ids(10, 1) for _ in range(99)) if stop not in diffuse(model, x, 18, **run).ids[0, 10:])
    assert diffuse(model, torch.cat([prompt, other]), 18, stop_id=stop, **run).ids.shape == (2, 28)


def test_a_shifted_model_is_the_same_model_that_predicts_one_later(model):
    """A model whose row t says what row t + 1 says here; the first token of a block comes from the call before."""

    def shifted(tokens, positions, attend):
        logits = model(tokens, positions, attend)
        return torch.cat([logits[:, 1:], logits[:, -1:]], 1)

    run = dict(mask_id=SIZES.mask_id, block=4)
    prompt = ids(9)
    want, done = diffuse(model, prompt, 3, **run), diffuse(shifted, prompt, 3, shifted=True, **run)
    assert torch.equal(done.ids, want.ids)
    next_block = diffuse(shifted, prompt, 7, shifted=True, **run)
    assert next_block.blocks[1].steps[:, 0].eq(0).all()
    last = whole(model, done.ids)[:, -1].index_fill(-1, torch.tensor([SIZES.mask_id]), -torch.inf)
    assert torch.equal(next_block.ids[:, 12], last.argmax(-1))
    with pytest.raises(ValueError, match="the prompt must have at least one"):
        diffuse(shifted, prompt[:, :0], 4, shifted=True, **run)


# ---- the policy


def site(phase, rows=4, prefix=20, layer=2):
    q, k, v = (torch.randn(2, h, n, 16, dtype=torch.float64) for h, n in ((4, rows), (2, prefix + rows), (2, prefix + rows)))
    return AttentionSite.of(Operands(q, k, v), MaskFacts(False), 0.3, phase=phase, layer=layer)


def test_the_list_is_the_heaviest_of_the_mean_over_queries_and_heads():
    at, state = site("denoise_first"), {}
    keys = FEW.select(call, at, state)
    x = at.operands
    weights = (0.3 * x.q.unflatten(1, (2, 2)) @ x.k[:, :, None].mT).softmax(-1)[..., :20].mean((2, 3))  # [B, Hk, N]
    want = weights.topk(3).indices.sort().values
    assert torch.equal(keys.indices[..., :3].long(), want)
    assert keys.indices[..., 3:].eq(torch.arange(20, 24)).all()
    assert keys.counts.tolist() == [7, 7]
    dense = torch.nn.functional.scaled_dot_product_attention(x.q, x.k, x.v, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(FEW.attend(call, at, keys), dense)


def test_further_steps_read_the_list_and_the_block_alone():
    first, state = site("denoise_first"), {}
    keys = FEW.select(call, first, state)
    later = dataclasses.replace(first, phase="denoise")
    assert FEW.select(call, later, state) is keys
    x = later.operands
    seen = torch.zeros(2, 2, 24, dtype=torch.bool).scatter(2, keys.indices.long(), True).repeat_interleave(2, 1)
    want = torch.nn.functional.scaled_dot_product_attention(x.q, x.k, x.v, attn_mask=seen[:, :, None], scale=0.3, enable_gqa=True)
    torch.testing.assert_close(FEW.attend(call, later, keys), want)
    with pytest.raises(RuntimeError, match="layer 2 has no list for a prefix of 21 tokens"):
        FEW.select(call, site("denoise", prefix=21), state)
    with pytest.raises(RuntimeError, match="no list"):
        FEW.select(call, later, None)


def test_a_new_block_selects_again_and_dense_layers_read_everything(model):
    seen = []

    def watch(at, keys):
        seen.append((at.layer, at.k_len, keys))

    diffuse(model, ids(8), 8, mask_id=SIZES.mask_id, block=4, plan=FEW, watch=watch)
    assert [x[0] for x in seen] == [1, 2] * 6  # three further steps a block; layer 0 is dense
    for layer in (1, 2):
        lists = [keys.indices for n, _, keys in seen if n == layer]
        assert all(torch.equal(lists[0], x) for x in lists[:3])
        assert all(torch.equal(lists[3], x) for x in lists[3:])
        assert lists[0].max() == 11
        assert lists[3].max() == 15
    assert "the first 1 are dense" in why_dense(FEW, site("denoise", layer=0))


def test_what_is_reported(model):
    run = dict(mask_id=SIZES.mask_id, block=4)
    some = diffuse(model, ids(8), 8, plan=tsa.Remembered("denoise_first", keys=10, dense_layers=1), **run)
    assert some.never_bit == 0.5  # 8 tokens are all remembered, of 12 not
    assert some.sparse_share == pytest.approx(1 / 3)  # one of two blocks, two of three layers
    assert some.blocks[0].counts.reasons == {"layer 0: the first 1 are dense"}
    dense = diffuse(model, ids(8), 8, **run)
    assert (dense.never_bit, dense.sparse_share) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(source="decode"), r"Remembered\.source must be one of \('denoise_first', 'verify'\), got 'decode'"),
        (dict(keys=0), r"Remembered\.keys must be an int >= 1, got 0"),
        (dict(ratio=1.5), r"Remembered\.ratio must be a number in \(0, 1\], or None, got 1\.5"),
        (dict(dense_layers=-1), r"Remembered\.dense_layers must be an int >= 0"),
        (dict(queries=0), r"Remembered\.queries must be an int >= 1"),
        (dict(share="layer"), r"Remembered\.share must be one of \('kv_head',\) from 'denoise_first', got 'layer'"),
    ],
)
def test_a_bad_field_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        tsa.Remembered(**{"source": "denoise_first"} | fields)
    assert from_dict(FEW.to_dict()) == FEW


def test_a_model_is_not_transformed_by_it():
    module = torch.nn.Linear(2, 2)
    for use in (lambda: tsa.transform(module, FEW), lambda: tsa.explain(module, torch.zeros(2), policy=FEW)):
        with pytest.raises(
            ValueError, match=r"Remembered is for denoise and denoise_first, phases of generate\.diffusion\.diffuse"
        ):
            use()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(part=3), "part must divide the 4 tokens of a block, got 3"),
        (dict(part=2, steps=3), "steps must be a multiple of the 2 parts of a block, got 3"),
        (dict(shifted=True, block=1), "block must be at least 2 where predictions are shifted"),
        (dict(block=0), "block must be at least 1, got 0"),
        (dict(steps=5), "steps must be from 1 to the 4 tokens of a block, got 5"),
        (dict(threshold=0), r"threshold must be in \(0, 1\], got 0"),
        (dict(temperature=-1), "temperature must be at least 0"),
        (dict(new_tokens=0), "new_tokens must be at least 1, got 0"),
        (dict(plan=tsa.TokenSparse()), "block diffusion has no policy for prefill"),
    ],
)
def test_bad_arguments_are_named(model, changes, message):
    given = dict(new_tokens=4, mask_id=SIZES.mask_id, block=4) | changes
    with pytest.raises(ValueError, match=message):
        diffuse(model, ids(8), given.pop("new_tokens"), **given)


# ---- trained


@dataclasses.dataclass(frozen=True)
class Misled(tsa.Remembered):
    """Remembers fillers, which answer nothing."""

    fillers: tuple[tuple[int, ...], ...] = ()  # of each row

    def select(self, emit, site, state):
        keys, wrong = super().select(emit, site, state), torch.tensor(self.fillers, dtype=torch.int32)
        both = [wrong[:, None].expand(-1, site.kv_heads, -1), keys.indices[..., wrong.shape[1] :]]
        return Keys(torch.cat(both, 2), keys.counts)


@pytest.fixture(scope="module")
def trained():
    task = RecallTask(keys=4, values=4, questions=3, prefix=12)
    return task, train(task, task.sizes(width=32, layers=2, heads=2, kv_heads=1, mlp=64), steps=160, batch=64, rate=2e-2)


def test_a_trained_model_recalls_by_the_right_list_and_falls_to_chance_by_a_wrong_one(trained):
    task, model = trained
    rows = 300
    plans = {"dense": None, "six": tsa.Remembered("denoise_first", keys=6, dense_layers=0)}
    found = evaluate(model, task, plans, rows)
    assert found["dense"].right > 0.98
    assert found["six"].later > 0.97
    assert found["six"].mass > 0.7
    assert found["six"].never_bit == 0
    assert found["dense"].mass is None
    assert found["six"].forwards == found["dense"].forwards == task.questions
    chance = 1 / task.values + 3 * (1 / task.values * (1 - 1 / task.values) / (2 * rows)) ** 0.5
    assert misled(task, model, rows) <= chance


def misled(task, model, rows):
    """Share of right answers in further steps, each prompt with a list of its own fillers in place of the heaviest keys."""
    ids = task.sample(rows, torch.Generator().manual_seed(1))
    fillers = (ids[:, : task.prefix] >= task.first_filler).float().topk(6).indices.tolist()
    plan = Misled("denoise_first", keys=6, dense_layers=0, fillers=tuple(map(tuple, fillers)))
    prompt = ids[:, : -task.questions]
    done = diffuse(model, prompt, task.questions, mask_id=model.sizes.mask_id, block=task.block, plan=plan)
    later = done.blocks[-1].steps[:, -task.questions :] > 1
    return (done.ids == ids)[:, -task.questions :][later].float().mean().item()


def test_the_mass_that_a_wrong_list_holds_is_small(trained):
    """The measure judges by the step's own exact attention, not by the list."""
    at, watch = site("denoise", prefix=40), Recall()
    right = tsa.Remembered("denoise_first", keys=10).select(call, dataclasses.replace(at, phase="denoise_first"), {})
    watch(at, right)
    others = torch.ones(2, 2, 40).scatter(2, right.indices[..., :10].long(), 0.0).topk(10).indices
    watch(at, Keys(torch.cat([others.int(), right.indices[..., 10:]], 2), right.counts))
    assert watch.overlap == [1.0, 0.0]
    assert watch.mass[0] > 0.4 > watch.mass[1]


def sum_loss(*args):
    return sum(training_loss(*args))


def test_training_is_of_masked_tokens_of_the_blocks_before_and_the_own(model):
    """The loss of a later block does not change with the clean tokens of its own or of blocks behind it."""
    tokens, noise = ids(16), torch.zeros(2, 16, dtype=torch.bool)
    noise[:, 8:10] = True
    mask = training_mask(16, 4)
    base = sum_loss(model, tokens, noise, mask)
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % SIZES.mask_id
    assert torch.equal(sum_loss(model, changed, noise, mask), base)
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % SIZES.mask_id
    assert not torch.equal(sum_loss(model, changed, noise, mask), base)
    last = sum_loss(model, tokens[:, :12], noise[:, 8:12], training_mask(12, 4, 8), 8)
    torch.testing.assert_close(last, base)


@pytest.mark.gpu
def test_the_selection_on_a_stream_of_its_own_gives_the_same_tokens():
    model = BlockLM(Sizes(vocabulary=40, block=32, width=256, layers=4, heads=4, kv_heads=2)).cuda().eval()
    plan = tsa.Remembered("denoise_first", keys=64, dense_layers=1)
    run = dict(mask_id=39, block=32, steps=8, plan=plan)
    prompt = torch.randint(39, (2, 2048), device="cuda")
    want = None
    for aside in (False, True):
        lists = []
        with pytest.MonkeyPatch.context() as patch:
            if not aside:
                patch.setattr(BlockCache, "_select_aside", lambda self, policy, at, state: policy.select(call, at, state))
            done = diffuse(model, prompt, 96, watch=lambda at, keys, lists=lists: lists.append(keys.indices), **run)
        want = want or (done.ids, lists)
        assert torch.equal(done.ids, want[0])
        assert all(torch.equal(a, b) for a, b in zip(lists, want[1], strict=True))
