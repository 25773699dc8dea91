"""Finding marks in a text that is still arriving."""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.text.parsers.events import Call, Content, Event


def first_mark(text: str, marks: Sequence[str]) -> tuple[int, str] | None:
    """Where the first mark is, and which; of two at one place, the longer."""
    found = [(at, -len(mark), mark) for mark in marks if (at := text.find(mark)) >= 0]
    if not found:
        return None
    at, _, mark = min(found)
    return at, mark


def before_mark(text: str, marks: Sequence[str]) -> int:
    """How much of a text without marks is certain: its end may be the beginning of one."""
    longest = max(map(len, marks), default=1)
    for at in range(max(0, len(text) - longest + 1), len(text)):
        if any(mark.startswith(text[at:]) for mark in marks):
            return at
    return len(text)


class ContentGate:
    """Content and calls on their way out: numbers calls, and drops the space that sets them off."""

    def __init__(self) -> None:
        self._space = ""  # at the end so far: content only if content follows
        self._calls = 0
        self._after_call = False

    def content(self, text: str) -> list[Event]:
        if self._after_call:
            text = text.lstrip()
        if not text:
            return []
        self._after_call = False
        text = self._space + text
        shown = text.rstrip()
        self._space = text[len(shown) :]
        return [Content(shown)] if shown else []

    def calls(self, calls: Sequence[Call]) -> list[Event]:
        self._space, self._after_call = "", True
        first = self._calls
        self._calls += len(calls)
        return [call.event(first + i) for i, call in enumerate(calls)]

    def finish(self) -> list[Event]:
        space, self._space = self._space, ""
        return [Content(space)] if space else []
