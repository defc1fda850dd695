"""A streaming client of an OpenAI-style server, in the standard library alone: prints tokens as they come, and how soon they did.

python examples/serve/client.py TEXT_FILE [QUESTION] [--url http://localhost:8000] [--tokens 128]
"""

from __future__ import annotations

import argparse
import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path


def stream(url: str, prompt: str, tokens: int) -> Iterator[str]:
    """The completion of a prompt, piece by piece; closing the iterator aborts the request."""
    body = {"model": model_of(url), "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as response:
        for line in response:
            data = line.decode().removeprefix("data:").strip()
            if data and data != "[DONE]":
                yield json.loads(data)["choices"][0]["text"]


def model_of(url: str) -> str:
    """The name that the server has for its model."""
    with urllib.request.urlopen(f"{url}/v1/models") as response:
        return json.load(response)["data"][0]["id"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("text", type=Path)
    parser.add_argument("question", nargs="?", default="\n\nIn one sentence, the text above says that")
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--tokens", type=int, default=128)
    given = parser.parse_args()
    began, first, pieces = time.perf_counter(), None, 0
    for piece in stream(given.url, given.text.read_text() + given.question, given.tokens):
        first = first or time.perf_counter()
        pieces += 1
        print(piece, end="", flush=True)
    if first is not None:
        print(f"\n\nfirst token after {first - began:.2f} s, {pieces} pieces in {time.perf_counter() - first:.2f} s from then on")


if __name__ == "__main__":
    main()
