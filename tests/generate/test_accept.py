"""The accept rule, by exact enumeration: all drafts, all rejections, on vocabularies of 4 to 8 tokens, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from tsa_compile.generate.accept import Accepted, accept_greedy, accept_sampled, correction, keep_chances, leading, up_to_end

PROCESSORS = {
    "none": (),
    "temperature": (("TemperatureLogitsWarper", 0.6),),
    "top-k": (("TopKLogitsWarper", 2),),
    "top-p": (("TopPLogitsWarper", 0.7),),
    "all three": (("TemperatureLogitsWarper", 1.7), ("TopKLogitsWarper", 3), ("TopPLogitsWarper", 0.9)),
    "repetition": (("RepetitionPenaltyLogitsProcessor", 1.6), ("TopKLogitsWarper", 3)),
}


class Toy:
    """Logits that depend on all tokens before, those of a draft near those of its target."""

    def __init__(self, vocabulary: int, processors: tuple, distance: float) -> None:
        transformers = pytest.importorskip("transformers")
        self.vocabulary, self.distance = vocabulary, distance
        self.processors = transformers.LogitsProcessorList(getattr(transformers, name)(value) for name, value in processors)

    def law(self, ids: tuple[int, ...], draft: bool) -> torch.Tensor:
        """The distribution `[V]` of the token behind `ids`, after the processors."""
        seed = sum((token + 1) * 31**n for n, token in enumerate(ids))
        noise = torch.randn(2, self.vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        logits = 2 * noise[0] + (self.distance * noise[1] if draft else 0)
        return self.processors(torch.tensor([ids]), logits[None])[0].softmax(-1)

    def chain(self, prompt: tuple[int, ...], tokens: tuple[int, ...], draft: bool) -> torch.Tensor:
        """`[len(tokens) + 1, V]`: the laws at each token's place and behind the last."""
        return torch.stack([self.law(prompt + tokens[:n], draft) for n in range(len(tokens) + 1)])


def law_of_a_round(toy: Toy, prompt: tuple[int, ...], n: int, certain: bool = False) -> torch.Tensor:
    """`[V] * (n + 1)`: the law of the next n + 1 tokens, those behind a rejection being the target's own."""
    drafts = list(itertools.product(range(toy.vocabulary), repeat=n))
    drafted = torch.tensor(drafts).view(len(drafts), n)
    target = torch.stack([toy.chain(prompt, d, False) for d in drafts])
    draft = torch.stack([toy.chain(prompt, d, True) for d in drafts])[:, :n]
    chosen = draft.gather(2, drafted[..., None])[..., 0].prod(1)
    if certain:  # a draft without a distribution: the first that comes to mind
        chosen, draft = torch.zeros_like(chosen).index_fill(0, torch.tensor([len(drafts) // 2]), 1.0), None
    chances = keep_chances(drafted, draft, target)
    law = torch.zeros([toy.vocabulary] * (n + 1), dtype=torch.float64)
    for kept in range(n + 1):
        kept_rows = torch.full((len(drafts),), kept)
        chance = chosen * chances[:, :kept].prod(1) * (1 - chances[:, kept] if kept < n else 1)
        own = correction(kept_rows, drafted, draft, target)
        torch.testing.assert_close(own.sum(1), torch.ones(len(drafts), dtype=torch.float64))
        for row in range(len(drafts)):
            for token in range(toy.vocabulary):
                tokens = (*drafts[row][:kept], token)
                law[tokens] += chance[row] * own[row, token] * rest_of(toy, prompt + tokens, n - kept)
    return law


def rest_of(toy: Toy, ids: tuple[int, ...], n: int) -> torch.Tensor:
    """The target's law of the next n tokens, `[V] * n`; 1 if there are none."""
    if n == 0:
        return torch.ones((), dtype=torch.float64)
    own = toy.law(ids, False)
    return torch.stack([own[token] * rest_of(toy, (*ids, token), n - 1) for token in range(toy.vocabulary)])


@pytest.mark.parametrize("processors", PROCESSORS)
@pytest.mark.parametrize(("vocabulary", "n"), [(4, 2), (8, 1)])
def test_the_law_is_the_targets(processors, vocabulary, n):
    for distance, certain in ((0.0, False), (0.7, False), (5.0, False), (1.0, True)):
        toy = Toy(vocabulary, PROCESSORS[processors], distance)
        want = rest_of(toy, (1, 2), n + 1)
        torch.testing.assert_close(law_of_a_round(toy, (1, 2), n, certain), want, atol=1e-12, rtol=0)


@pytest.mark.slow
def test_the_law_of_longer_drafts():
    toy = Toy(5, PROCESSORS["all three"], 1.0)
    torch.testing.assert_close(law_of_a_round(toy, (3,), 3), rest_of(toy, (3,), 4), atol=1e-12, rtol=0)


def test_what_the_target_never_says_is_never_kept():
    """A draft outside of the target's top-k, and a token that the draft itself never says."""
    target = torch.tensor([[[0.5, 0.5, 0.0, 0.0], [0.25] * 4]], dtype=torch.float64)
    draft = torch.tensor([[[0.0, 0.0, 1.0, 0.0]]], dtype=torch.float64)
    assert keep_chances(torch.tensor([[2]]), draft, target).tolist() == [[0.0]]
    assert keep_chances(torch.tensor([[0]]), draft, target).tolist() == [[0.0]]
    assert correction(torch.tensor([0]), torch.tensor([[2]]), draft, target).tolist() == [[0.5, 0.5, 0.0, 0.0]]


def test_samples_have_the_law_of_the_enumeration():
    """One round, drawn 60,000 times: within five standard errors in each of the 64 outcomes."""
    toy, number = Toy(4, PROCESSORS["temperature"], 1.0), 60_000
    first, draft = toy.law((1,), True), torch.stack([toy.law((1, t), True) for t in range(4)])
    x = torch.multinomial(first, number, True)
    drafted = torch.stack([x, torch.multinomial(draft[x], 1)[:, 0]], 1)
    table = torch.stack([toy.chain((1,), d, False) for d in itertools.product(range(4), repeat=2)])
    target = table[drafted[:, 0] * 4 + drafted[:, 1]]
    kept, tokens = accept_sampled(drafted, torch.stack([first.expand(number, -1), draft[x]], 1), target)
    want, one = rest_of(toy, (1,), 3).flatten(1), tokens[:, 0]
    for token in range(4):
        share, sure = float((one == token).double().mean()), float(want[token].sum())
        assert abs(share - sure) < 5 * (sure * (1 - sure) / number) ** 0.5
    assert (tokens.gather(1, kept[:, None])[:, 0] < 4).all()
    agree = drafted == tokens[:, :2]
    assert (leading(agree) >= kept).all()


def test_greedy_keeps_up_to_the_first_difference():
    scores = torch.nn.functional.one_hot(torch.tensor([[3, 1, 2], [3, 1, 2], [3, 1, 2]]), 5).double()
    kept, tokens = accept_greedy(torch.tensor([[3, 1], [3, 0], [0, 1]]), scores)
    assert kept.tolist() == [2, 1, 0]
    assert [row[: k + 1] for row, k in zip(tokens.tolist(), kept.tolist(), strict=True)] == [[3, 1, 2], [3, 1], [3]]


def test_no_draft_is_one_step():
    target = torch.tensor([[[0.0, 1.0, 0.0]]])
    none = torch.empty(1, 0, dtype=torch.long)
    for accepted in (accept_greedy(none, target), accept_sampled(none, None, target)):
        assert (accepted.kept.tolist(), accepted.tokens.tolist()) == ([0], [[1]])


def test_nothing_comes_behind_an_end():
    accepted = Accepted(torch.tensor([2, 2, 1, 0]), torch.tensor([[5, 9, 5], [5, 5, 5], [5, 7, 9], [9, 9, 9]]))
    new, ended = up_to_end(accepted, torch.tensor([9, 7]))
    assert new.tolist() == [2, 3, 2, 1]
    assert ended.tolist() == [True, False, True, True]
    new, ended = up_to_end(accepted, None)
    assert new.tolist() == [3, 3, 2, 1]
    assert not ended.any()
