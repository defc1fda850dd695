"""The progress bar: what it shows, and that it changes nothing of what runs under it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tsa_compile.progress import progress, step, track


def shown() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=120), out


def test_items_pass_through_and_are_counted():
    console, out = shown()
    assert list(track(iter("abc"), "letters", 3, console)) == ["a", "b", "c"]
    assert "letters" in out.getvalue()
    assert "3/3" in out.getvalue()


def test_a_step_is_done_only_if_its_block_ends():
    console, out = shown()
    with step("[build] it", console):
        pass
    assert "[build] it" in out.getvalue()
    assert "1/1" in out.getvalue()
    with pytest.raises(KeyError), step("fails", console):
        raise KeyError
    assert "0/1" in out.getvalue()


def test_the_text_follows_the_work():
    console, out = shown()
    with progress(console) as start:
        advance = start("first", 2)
        advance("second")
        advance()
    assert "second" in out.getvalue()
    assert "2/2" in out.getvalue()


def test_not_shown():
    console, out = shown()
    with progress(console, show=False) as start:
        start("quiet", 1)()
    assert out.getvalue() == ""
