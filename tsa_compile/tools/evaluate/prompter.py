"""Tasks as token ids of an exact length, so that the samples of a cell make one batch without padding."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from tsa_compile.tools.bench.prompts import essay
from tsa_compile.tools.evaluate.reference_text import reference_text
from tsa_compile.tools.evaluate.tasks import Question, Task

_PARAGRAPHS = 600  # in the pool that texts are drawn from
_PARAGRAPH_WORDS = 75
_MARK = "<<<>>>"
Ids = list[int]


class Prompter:
    """Writes tasks for one tokenizer: in its chat form, or as plain text to be continued if it has none (base models).

    Attributes:
        chat: the tokenizer has a chat form.
        frame: what stands before a message and after it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.chat = self._chat = bool(getattr(tokenizer, "chat_template", None))
        self.frame = before, after = self._frame()
        self._before, self._after = self._encode(before), after
        if not self._chat and tokenizer.bos_token_id is not None:
            self._before = [tokenizer.bos_token_id, *self._before]
        self._pool: list[Ids] = []
        self._text: Ids = []

    def prompt(self, task: Task, length: int, seed: int) -> Ids:
        """Exactly `length` token ids: the text with its facts, the question, and the words its answer begins with.

        Raises:
            ValueError: the question and the facts alone are longer.
        """
        tail = self._encode(f"\n\n{self._ask(task.question)}")
        room = length - len(self._before) - len(tail)
        text = self._list(task, room) if task.words else self._prose(task, room, random.Random(seed))
        return [*self._before, *text, *tail]

    def prompt_ids(self, text: str) -> Ids:
        """A whole prompt, its chat form included."""
        bos = self._tokenizer.bos_token_id
        return [*([] if self._chat or bos is None else [bos]), *self._encode(text)]

    def encode(self, text: str) -> Ids:
        return self._encode(text)

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self._encode(text))

    def follow_ups(self, tasks: Sequence[Task]) -> list[Ids]:
        """What comes after each prompt in the second turn: the first answer, the second question, its answer's beginning.

        All of one length: line breaks fill up behind the first answer.
        """
        pairs = [self._second_turn(t.question, t.follow_up) for t in tasks if t.follow_up is not None]
        longest = max(len(answer) + len(rest) for answer, rest in pairs)
        return [[*a, *[self._blank()] * (longest - len(a) - len(rest)), *rest] for a, rest in pairs]

    def answer(self, question: Question) -> Ids:
        """The right answer, as it would be written."""
        return self._encode(f" {', '.join(question.answers)}")

    def decode(self, ids: Ids) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def text(self, length: int, index: int, count: int) -> Ids:
        """Window `index` of `count` over the reference text, `length` token ids; they overlap if the text is too short."""
        if not self._text:
            self._text = self._encode(reference_text())
        bos = self._tokenizer.bos_token_id
        first = [] if bos is None or self._chat else [bos]
        room = length - len(first)
        if len(self._text) < room:
            raise ValueError(f"the reference text has {len(self._text)} tokens, fewer than {room}")
        start = (len(self._text) - room) * index // max(count - 1, 1)
        return [*first, *self._text[start : start + room]]

    def _frame(self) -> tuple[str, str]:
        """What stands before the text and after the question."""
        if not self._chat:
            return "", "\n"
        message = [{"role": "user", "content": _MARK}]
        rendered = self._tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        before, after = rendered.split(_MARK)
        return before, after

    def _second_turn(self, first: Question, second: Question) -> tuple[Ids, Ids]:
        answer = self._encode(f" {first.answers[0]}.")
        if not self._chat:
            return answer, self._encode(f"\n\n{self._ask(second)}")
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _MARK}]
        messages.append({"role": "user", "content": second.text})
        rendered = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return answer, self._encode(rendered.split(_MARK)[1] + second.lead)

    def _blank(self) -> int:
        return self._encode("\n")[-1]

    def _ask(self, question: Question) -> str:
        if self._chat:
            return f"{question.text}{self._after}{question.lead}"
        return f"Question: {question.text}\nAnswer: {question.lead}"

    def _prose(self, task: Task, room: int, rng: random.Random) -> Ids:
        facts = [(depth, self._encode(f"\n\n{fact}")) for depth, fact in task.facts]
        room -= sum(len(ids) for _, ids in facts)
        if room < 0:
            raise ValueError(f"the facts of the task are longer than the prompt by {-room} tokens")
        paragraphs = self._fill(room, rng)
        for depth, ids in sorted(facts, key=lambda f: -f[0]):
            paragraphs.insert(round(depth * len(paragraphs)), ids)
        return [i for p in paragraphs for i in p]

    def _fill(self, room: int, rng: random.Random) -> list[Ids]:
        if not self._pool:
            self._pool = [self._encode(f"\n\n{essay(_PARAGRAPH_WORDS, seed)}") for seed in range(_PARAGRAPHS)]
        out: list[Ids] = []
        while room > 0:
            for paragraph in rng.sample(self._pool, len(self._pool)):
                out.append(paragraph[:room])
                room -= len(out[-1])
                if room <= 0:
                    break
        return [p for p in out if p]

    def _list(self, task: Task, room: int) -> Ids:
        """As many words as fit, then line breaks up to `room`."""
        assert task.words is not None
        count = room
        while True:
            lines = "\n".join(f"{n}. {word}" for n, word in enumerate(task.words(count), 1))
            ids = self._encode(lines)
            if len(ids) <= room:
                return ids + [self._blank()] * (room - len(ids))
            count = min(count - 1, count * room // len(ids))

    def _encode(self, text: str) -> Ids:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)
