"""What sparse prefill changes for a real model in an engine: the answer about a long text, and what its last rows predict."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from tsa_compile.tools.bench.prompts import needle_ids, needle_prompt
from tsa_compile.tools.bench.serving_alpha import read_share
from tsa_compile.tools.bench.serving_requests import answer

Tensor = torch.Tensor
ROWS, LAST = 512, 128  # rows that are compared; the last of them read every key
DEPTHS = (0.25, 0.5, 0.75)


def quality(llm: Any, length: int, file: str) -> dict[str, Any]:
    """A five-digit number in a text of `length` tokens or fewer, at three depths; the last text's last logits go to `file`."""
    tokenizer = llm.get_tokenizer()
    said: list[tuple[str, str]] = []
    for depth in DEPTHS:
        ids, number = text(tokenizer, length, depth)
        with LastRows(llm, len(ids)) as rows:
            share, answers = read_share(functools.partial(answer, llm, [ids], 12))
        said.append((number, tokenizer.decode(answers[0].outputs[0].token_ids)))
    torch.save(rows.logits(), file)
    right = sum(number in found for number, found in said)
    return {"right": right, "of": len(DEPTHS), "said": said, "logits": file, "pairs": share, "tokens": len(ids)}


def text(tokenizer: Any, length: int, depth: float) -> tuple[list[int], str]:
    """Token ids of the question, at most `length`, in the tokenizer's chat form if it has one; and the answer."""
    if getattr(tokenizer, "chat_template", None):
        ids, number = needle_ids(tokenizer, length, depth)
        return ids[0].tolist(), number
    prompt = needle_prompt(length // 2, depth)
    ids = tokenizer(f"{prompt.text}\n\nThe special magic number is", add_special_tokens=False).input_ids
    return ids[:1] + ids[max(1, len(ids) - length + 1) :], prompt.answer


class LastRows:
    """While open, keeps what the model gives for the last rows of the next prompt, however it is cut into steps."""

    def __init__(self, llm: Any, length: int) -> None:
        self.llm, self.left, self.kept = llm, length, list[Tensor]()

    def __enter__(self) -> LastRows:
        self.hooks = self.llm.apply_model(lambda model: model.register_forward_hook(self.see))
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def see(self, model: Any, given: Any, out: Tensor) -> None:
        """A step's rows; its real ones come first, and the step after the prompt is no part of it."""
        step = min(self.left, self.llm.llm_engine.engine_core.engine_core.scheduler.max_num_scheduled_tokens)
        self.left -= step
        self.kept = [torch.cat([*self.kept, out[:step]])[-ROWS:]]

    def logits(self) -> Tensor:
        """float32 `[rows, words]`, on the CPU."""
        if self.left or not self.kept:
            raise RuntimeError(f"the model was not seen to compute the prompt: {self.left} of its rows are missing")
        found: list[Tensor] = self.llm.apply_model(lambda model: model.compute_logits(self.kept[0]).float().cpu())
        return found[0]


def distance(own: str, ours: str) -> dict[str, Any]:
    """Of logits in two files, which are deleted: KL divergence in nats and agreement of the likeliest token.

    For the last 128 rows, which read every key, and for the rows before them.
    """
    a, b = (torch.load(file).double().log_softmax(-1) for file in (own, ours))
    divergence, same = (a.exp() * (a - b)).sum(-1), (a.argmax(-1) == b.argmax(-1)).double()
    parts = {"last": slice(-LAST, None), "before": slice(0, -LAST)}
    found = {
        f"{what}_{name}": float(x[part].mean())
        for what, x in (("kl", divergence), ("same", same))
        for name, part in parts.items()
    }
    for file in (own, ours):
        Path(file).unlink()
    return found
