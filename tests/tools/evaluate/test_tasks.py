"""Tasks and prompts: seeded, answerable from their text, of the exact length; scores; the reference text."""

from __future__ import annotations

import random

import pytest

from tests.tools.evaluate.tiny_lm import byte_tokenizer
from tsa_compile.tools.evaluate import tasks
from tsa_compile.tools.evaluate.cells import DEPTHS, GENERATORS
from tsa_compile.tools.evaluate.prompter import Prompter
from tsa_compile.tools.evaluate.reference_text import reference_text, vocabulary

LENGTH = 2500


@pytest.fixture(scope="module", params=[True, False], ids=["chat", "base"])
def prompter(request):
    return Prompter(byte_tokenizer(request.param))


def text_of(prompter, task, seed=0):
    ids = prompter.prompt(task, LENGTH, seed)
    assert len(ids) == LENGTH
    return prompter.decode(ids)


@pytest.mark.parametrize("name", GENERATORS)
def test_a_seed_gives_one_task_and_the_text_names_its_answers(prompter, name):
    task, again, other = (GENERATORS[name](random.Random(seed)) for seed in (1, 1, 2))
    text = text_of(prompter, task)
    assert text == text_of(prompter, again)
    assert text != text_of(prompter, other)
    assert text.endswith(task.question.lead)
    assert task.question.text in text
    assert all(a in text for a in task.question.answers)
    for _, fact in task.facts:
        assert fact in text


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_needle_lies_at_its_depth(prompter, depth):
    task = tasks.needle(random.Random(3), depth)
    text = text_of(prompter, task)
    body = text[: text.index(task.question.text)]
    assert body.count(task.question.answers[0]) == 2
    assert body.index(task.facts[0][1]) / len(body) == pytest.approx(depth, abs=0.25)


def test_each_chain_of_assignments_leads_to_its_value():
    task = tasks.variable_tracking(random.Random(5))
    parts = [fact.removeprefix("The value of ").rstrip(".") for _, fact in sorted(task.facts)]
    values: dict[str, str] = {}
    for name, what in (p.split(" is ", 1) for p in parts):
        values[name] = values[what.removeprefix("the same as the value of ")] if what.startswith("the same") else what
    asked = task.question.text.removeprefix("Which number is the value of ").rstrip("?")
    assert (values[asked],) == task.question.answers
    assert len(set(values.values())) == 4


def test_common_words_are_the_most_common():
    task = tasks.common_words(random.Random(7))
    words = task.words(600)
    assert len(words) == 600
    ranked = sorted(set(words), key=words.count, reverse=True)
    assert set(ranked[:3]) == set(task.question.answers)
    assert words.count(ranked[3]) <= 3


def test_second_turns_are_of_one_length_and_end_with_the_beginning_of_the_answer(prompter):
    made = [tasks.multi_turn(random.Random(seed)) for seed in range(4)]
    turns = prompter.follow_ups(made)
    assert len({*map(len, turns)}) == 1
    for task, ids in zip(made, turns, strict=True):
        text = prompter.decode(ids)
        assert text.startswith(f" {task.question.answers[0]}.")
        assert text.endswith(task.follow_up.lead)
        assert task.follow_up.answers != task.question.answers


def test_a_prompt_too_short_for_its_facts_is_refused(prompter):
    with pytest.raises(ValueError, match="the facts of the task are longer than the prompt by"):
        prompter.prompt(tasks.multi_key(random.Random(0)), 300, 0)


def test_score_is_the_share_of_the_answers():
    assert tasks.score(" 12345 and 67890.", ["12345", "67890", "11111"]) == pytest.approx(2 / 3)
    assert tasks.score("", ["1"]) == 0


def test_windows_of_the_reference_text_start_apart(prompter):
    first, last = (prompter.text(400, i, 20) for i in (0, 19))
    assert len(first) == len(last) == 400
    assert first != last
    with pytest.raises(ValueError, match="the reference text has"):
        prompter.text(100_000_000, 0, 1)


def test_the_reference_text_is_prose_of_some_length():
    assert len(reference_text()) > 1_000_000
    assert len(vocabulary()) > 1000
    assert all(w.isalpha() for w in vocabulary())
