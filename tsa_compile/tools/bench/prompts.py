"""Long prompts with a known answer, generated from a seed: no data set, no download."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

_SUBJECTS = (
    "The harbour master", "A retired teacher", "My neighbour", "The night baker", "An old botanist", "The orchestra",
    "A travelling carpenter", "The village council", "Her younger brother", "The museum guide", "A patient gardener",
    "The ferry captain", "Our first landlord", "The watchmaker", "A group of students", "The mountain rescue team",
)  # fmt: skip
_VERBS = (
    "described", "remembered", "argued about", "repaired", "painted", "measured", "wrote a long letter about",
    "was often seen near", "refused to sell", "spent the winter with", "learned to love", "took notes on",
)  # fmt: skip
_OBJECTS = (
    "the stone bridge", "a collection of maps", "the flooded orchard", "an unfinished boat", "the bell tower",
    "a book on tides", "the market square", "a field of rye", "the broken telescope", "an empty railway station",
    "the oldest oak in the valley", "a recipe for dark bread", "the library's north wing", "a flock of geese",
)  # fmt: skip
_ENDINGS = (
    "long before the road was built", "although nobody had asked", "and the rain did not stop for a week",
    "because the evenings were quiet", "as people in that region still do", "while the lamps were being lit",
    "and that changed how the town saw itself", "which is harder than it sounds", "until the first snow came",
    "with more care than skill", "and later told the story differently", "so the children would have something to find",
)  # fmt: skip
_LINKS = ("In those years", "By then", "Some say that", "Every spring", "On most days", "Later", "For a while", "Once")


def essay(words: int, seed: int) -> str:
    """Plain prose of about `words` words in paragraphs; the same seed gives the same text."""
    rng = random.Random(seed)
    paragraphs, sentences, count = [], [], 0
    while count < words:
        subject = rng.choice(_SUBJECTS)
        if rng.random() < 0.4:
            subject = f"{rng.choice(_LINKS)} {subject[0].lower()}{subject[1:]}"
        sentence = f"{subject} {rng.choice(_VERBS)} {rng.choice(_OBJECTS)} {rng.choice(_ENDINGS)}."
        sentences.append(sentence)
        count += sentence.count(" ") + 1
        if len(sentences) == 6:
            paragraphs.append(" ".join(sentences))
            sentences = []
    return "\n\n".join([*paragraphs, " ".join(sentences)]).strip()


@dataclasses.dataclass(frozen=True)
class NeedlePrompt:
    """A question about one sentence hidden in a long text, and its answer."""

    text: str
    question: str
    answer: str


def needle_prompt(words: int, depth: float = 0.5, seed: int = 0) -> NeedlePrompt:
    """A five-digit number hidden at `depth` (0: start, 1: end) of about `words` words of prose.

    Raises:
        ValueError: `depth` is not in [0, 1].
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must be in [0, 1], got {depth}")
    answer = str(random.Random(seed).randint(10_000, 99_999))
    needle = f"The special magic number is {answer}. Remember it: the special magic number is {answer}."
    paragraphs = essay(words, seed).split("\n\n")
    paragraphs.insert(round(depth * len(paragraphs)), needle)
    return NeedlePrompt("\n\n".join(paragraphs), "What is the special magic number mentioned in the text?", answer)


def chat_ids(tokenizer: Any, prompt: NeedlePrompt) -> Any:
    """Token ids `[1, L]` (int64) of the prompt in the tokenizer's chat form, ready for `generate`."""
    content = f"{prompt.text}\n\n{prompt.question}"
    text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    return tokenizer(text + "The special magic number is", return_tensors="pt", add_special_tokens=False).input_ids


def needle_ids(tokenizer: Any, tokens: int, depth: float = 0.5, seed: int = 0) -> tuple[Any, str]:
    """A needle prompt of about `tokens` tokens (never more) and its answer."""
    words = tokens
    while True:
        prompt = needle_prompt(words, depth, seed)
        ids = chat_ids(tokenizer, prompt)
        if ids.shape[1] <= tokens:
            return ids, prompt.answer
        words = min(words - 1, int(words * tokens / ids.shape[1]))
