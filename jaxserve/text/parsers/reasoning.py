"""Reasoning between tags, before the answer."""

from __future__ import annotations

from typing import Literal

from jaxserve.text.parsers.events import Content, Event, OutputParser, Reasoning
from jaxserve.text.parsers.scan import before_mark

OPEN, CLOSE = "<think>", "</think>"


def reasoning_state(prompt: str) -> Literal["inside", "closed", "open"]:
    """Where a completion of this prompt begins.

    "inside" the reasoning, behind its tag; after a section that the template has "closed" (it does
    so to switch reasoning off); or it is "open" whether the model will reason.
    """
    end = prompt.rstrip()
    if end.endswith(OPEN):
        return "inside"
    return "closed" if end.endswith(CLOSE) else "open"


class ThinkParser:
    """`<think>…</think>`, and the answer handed on to another parser.

    The opening tag counts only where the text begins; a model may write about it later. Space at
    either end of the reasoning, and before the answer, is dropped.

    Args:
        answer: reads what follows the reasoning.
        inside: the text begins within the reasoning, because the prompt ends with the tag.
    """

    def __init__(self, answer: OutputParser, inside: bool = False):
        self._answer, self._inside = answer, inside
        self._text = ""
        self._step = self._begin
        self._leading = True  # no reasoning, or no answer after it, has been shown yet

    @property
    def needs_special_tokens(self) -> bool:
        return self._answer.needs_special_tokens

    def push(self, text_delta: str) -> list[Event]:
        self._text += text_delta
        return self._step()

    def finish(self) -> list[Event]:
        if self._step == self._begin:
            self._step = self._think if self._inside else self._pass
        events = self._step()
        if self._step == self._think:
            events += self._reasoning(self._text.rstrip())
        return events + self._answer.finish()

    def _begin(self) -> list[Event]:
        start = self._text.lstrip()
        if start.startswith(OPEN):
            self._text, self._step = start[len(OPEN) :], self._think
        elif OPEN.startswith(start):
            return []  # undecided
        else:
            self._step = self._think if self._inside else self._pass
        return self._step()

    def _think(self) -> list[Event]:
        head, close, tail = self._text.partition(CLOSE)
        if not close:
            # The tag or trailing space may be arriving: both are held back.
            certain = self._text[: before_mark(self._text, (CLOSE,))].rstrip()
            self._text = self._text[len(certain) :]
            return self._reasoning(certain)
        self._text, self._step = tail, self._after
        return self._reasoning(head.rstrip()) + self._after()

    def _reasoning(self, text: str) -> list[Event]:
        shown = text.lstrip() if self._leading else text
        self._leading = self._leading and not shown
        return [Reasoning(shown)] if shown else []

    def _after(self) -> list[Event]:
        """The answer has not begun: its first characters may only be space."""
        self._text = self._text.lstrip()
        if not self._text:
            return []
        self._step = self._pass
        return self._pass()

    def _pass(self) -> list[Event]:
        text, self._text = self._text, ""
        return self._answer.push(text)


class PlainParser:
    """Text that means nothing but itself."""

    needs_special_tokens = False

    def push(self, text_delta: str) -> list[Event]:
        return [Content(text_delta)] if text_delta else []

    def finish(self) -> list[Event]:
        return []
