"""Retrieval tasks after RULER (arXiv 2404.06654), in our own words: what is hidden where, the question, and what counts.

Each generator takes a seeded `random.Random`; the same seed gives the same task for every model and variant.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence

from tsa_compile.tools.evaluate.reference_text import vocabulary

KEYS = (
    "amber", "cobalt", "maple", "granite", "velvet", "saffron", "juniper", "marble", "copper", "indigo", "walnut", "crystal",
    "lavender", "bronze", "cedar", "scarlet",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, the words its answer begins with (they are part of the prompt), and what the answer must name."""

    text: str
    lead: str
    answers: tuple[str, ...]
    new_tokens: int = 7


@dataclasses.dataclass(frozen=True)
class Task:
    """A question about a long text.

    Args:
        question: asked at the end of the text.
        facts: (depth, sentence) hidden in prose; depth 0 is the start of the text, 1 its end.
        words: instead of prose, endlessly many words: the text is a numbered list of as many as fit.
        follow_up: a second question about the same text, asked after the first was answered.
    """

    question: Question
    facts: tuple[tuple[float, str], ...] = ()
    words: Callable[[int], Sequence[str]] | None = None
    follow_up: Question | None = None


def score(text: str, answers: Sequence[str]) -> float:
    """Share of `answers` that `text` names, in [0, 1]."""
    return sum(a in text for a in answers) / len(answers)


def needle(rng: random.Random, depth: float) -> Task:
    """One number at `depth`."""
    number = _number(rng)
    fact = f"The special magic number is {number}. Remember it: the special magic number is {number}."
    question = Question("What is the special magic number mentioned in the text?", "The special magic number is", (number,))
    return Task(question, ((depth, fact),))


def multi_key(rng: random.Random, keys: int = 8) -> Task:
    """Numbers of eight keys at depths drawn at random; one is asked for."""
    facts = _keyed(rng, keys)
    key, number = rng.choice(facts)
    return Task(_ask(key, number), _scatter(rng, [_statement(*f) for f in facts]))


def multi_value(rng: random.Random, values: int = 3) -> Task:
    """Three numbers of one key, far apart; all are asked for."""
    key = rng.choice(KEYS)
    numbers = [_number(rng) for _ in range(values)]
    facts = _scatter(rng, [f"One of the special magic numbers for {key} is {n}." for n in numbers])
    text = f"What are all the special magic numbers for {key} mentioned in the text?"
    lead = f"The special magic numbers for {key} mentioned in the text are"
    return Task(Question(text, lead, tuple(numbers), 8 * values), facts)


def variable_tracking(rng: random.Random, hops: int = 2, chains: int = 4) -> Task:
    """Chains of assignments, each name equal to the one before it; the value at the end of one chain is asked for."""
    names = rng.sample(KEYS, chains * (hops + 1))
    own = [names[i::chains] for i in range(chains)]
    values = [_number(rng) for _ in own]
    steps = [f"The value of {n} is {v}." for n, v in zip(names, values, strict=False)]
    for link in range(hops):
        steps += [f"The value of {chain[link + 1]} is the same as the value of {chain[link]}." for chain in own]
    asked = rng.randrange(chains)
    text = f"Which number is the value of {own[asked][-1]}?"
    return Task(
        Question(text, f"The value of {own[asked][-1]} is the number", (values[asked],)), _scatter(rng, steps, ordered=True)
    )


def common_words(rng: random.Random, common: int = 3, share: float = 0.5) -> Task:
    """A list of words of which three make up half; every other word comes up to three times. The three are asked for."""
    pool = list(vocabulary())
    rng.shuffle(pool)
    frequent, rare = pool[:common], pool[common:]
    seed = rng.random()

    def words(count: int) -> list[str]:
        often = round(count * share)
        out = [frequent[i % common] for i in range(often)] + [rare[i // 3 % len(rare)] for i in range(count - often)]
        random.Random(seed).shuffle(out)
        return out

    question = Question(
        "Which three words are the most common in the list?",
        "The three most common words in the list are",
        tuple(frequent),
        16,
    )
    return Task(question, words=words)


def multi_turn(rng: random.Random) -> Task:
    """Two keyed numbers in different halves of the text; first one is asked for, then the other."""
    (key, number), (other, second) = _keyed(rng, 2)
    depths = [rng.uniform(0.05, 0.45), rng.uniform(0.55, 0.95)]
    rng.shuffle(depths)
    facts = ((depths[0], _statement(key, number)), (depths[1], _statement(other, second)))
    return Task(_ask(key, number), tuple(sorted(facts)), follow_up=_ask(other, second))


def _number(rng: random.Random) -> str:
    return str(rng.randint(10_000, 99_999))


def _keyed(rng: random.Random, count: int) -> list[tuple[str, str]]:
    return [(key, _number(rng)) for key in rng.sample(KEYS, count)]


def _statement(key: str, number: str) -> str:
    return f"The special magic number for {key} is {number}."


def _ask(key: str, number: str) -> Question:
    text = f"What is the special magic number for {key} mentioned in the text?"
    return Question(text, f"The special magic number for {key} mentioned in the text is", (number,))


def _scatter(rng: random.Random, sentences: list[str], ordered: bool = False) -> tuple[tuple[float, str], ...]:
    """A depth for each sentence, one from each equal part of the text; `ordered`: in the order given."""
    n = len(sentences)
    if not ordered:
        sentences = rng.sample(sentences, n)
    return tuple(((i + rng.random()) / n, s) for i, s in enumerate(sentences))
