"""gpt-oss's harmony format: messages with a channel and, for tool calls, a recipient."""

from __future__ import annotations

import re

from jaxserve.text.parsers.events import Call, Event, Reasoning
from jaxserve.text.parsers.scan import ContentGate, before_mark, first_mark

_MESSAGE = "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>", "<|channel|>")
_HEADERS = ("<|start|>", "<|channel|>", " to=")  # the prompt ends with `<|start|>assistant`
_FUNCTIONS = "functions."


class HarmonyParser:
    """Reasoning from the analysis channel, calls to `functions.*`, content from the others.

    Text without a header is content, so that an answer begun in the prompt is read as well.
    """

    needs_special_tokens = True

    def __init__(self) -> None:
        self._text = ""
        self._raw = ""  # of the current message, in case it is no call after all
        self._header: str | None = None  # None: reading a header
        self._gate = ContentGate()

    def push(self, text_delta: str) -> list[Event]:
        self._text += text_delta
        events: list[Event] = []
        while (step := self._step()) is not None:
            events += step
        return events

    def finish(self) -> list[Event]:
        rest, self._text = self._text, ""
        if self._header is None:
            events = self._gate.content(rest)
        elif self._function():
            events = self._call(rest)
        else:
            events = self._show(rest)
        return events + self._gate.finish()

    def _step(self) -> list[Event] | None:
        """Reads one header, or what is certain of one body; None if more text is needed."""
        if not self._text:
            return None
        return self._read_header() if self._header is None else self._read_body()

    def _read_header(self) -> list[Event] | None:
        if not any(self._text.startswith(h) or h.startswith(self._text) for h in _HEADERS):
            self._header = ""
            return []
        header, mark, rest = self._text.partition(_MESSAGE)
        if not mark:
            return None
        self._header, self._raw, self._text = header, header + mark, rest
        return []

    def _read_body(self) -> list[Event] | None:
        found = first_mark(self._text, _ENDS)
        if found is None:
            if self._function():
                return None
            certain = before_mark(self._text, _ENDS)
            text, self._text = self._text[:certain], self._text[certain:]
            return self._show(text) if text else None
        at, mark = found
        body, rest = self._text[:at], self._text[at:]
        # `<|start|>` and `<|channel|>` belong to the next header
        self._text = rest if mark in _HEADERS else rest[len(mark) :]
        events = self._call(body) if self._function() else self._show(body)
        self._header, self._raw = None, ""
        return events

    def _show(self, text: str) -> list[Event]:
        assert self._header is not None
        hidden = "<|channel|>analysis" in self._header or self._recipient()
        if not hidden:
            return self._gate.content(text)
        return [Reasoning(text)] if text else []

    def _call(self, body: str) -> list[Event]:
        call = Call.of(self._function(), body.strip() or "{}")
        return self._gate.content(self._raw + body) if call is None else self._gate.calls([call])

    def _recipient(self) -> str:
        match = re.search(r"\bto=([^\s<]+)", self._header or "")
        return match[1] if match else ""

    def _function(self) -> str:
        """Name of the function that the current message calls, or ""."""
        recipient = self._recipient()
        return recipient.removeprefix(_FUNCTIONS) if recipient.startswith(_FUNCTIONS) else ""
