"""Tool calls between marks, as the families write them."""

# ruff: noqa: RUF001 - DeepSeek's tokens are spelled with fullwidth bars

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

from jaxserve.text.parsers.events import Call, Event, from_object, parse_json
from jaxserve.text.parsers.scan import ContentGate, before_mark, first_mark
from jaxserve.text.parsers.xml_calls import Schemas, read_xml

Read = Callable[[str], "list[Call] | None"]
"""The calls in the text between two marks; None if it is not what was announced."""


@dataclass(frozen=True)
class Format:
    """How a family writes tool calls.

    Attributes:
        opens: mark before a call.
        closes: mark after it; None if calls go on to the end of the text.
        read: what stands between.
        dropped: marks without a meaning of their own.
        needs_special_tokens: the marks are special tokens.
        bare: also read a text that begins like a call, without a mark.
        also: further marks before a call, and what closes each.
        whole: `read` is given the marks as well.
    """

    opens: str
    closes: str | None
    read: Read
    dropped: Sequence[str] = ()
    needs_special_tokens: bool = False
    bare: re.Pattern[str] | None = None
    also: Mapping[str, str] = field(default_factory=dict[str, str])
    whole: bool = False


class ToolParser:
    """Content with tool calls in it. What is no call after all is content, to the letter."""

    def __init__(self, form: Format):
        self._format = form
        self._marks = (form.opens, *form.also, *form.dropped)
        self._gate = ContentGate()
        self._text = ""
        self._open = ""  # the mark that announced a call, while inside one
        self._inside = False
        self._begun = form.bare is None

    @property
    def needs_special_tokens(self) -> bool:
        return self._format.needs_special_tokens

    def push(self, text_delta: str) -> list[Event]:
        self._text += text_delta
        events: list[Event] = []
        while (step := self._step()) is not None:
            events += step
        return events

    def finish(self) -> list[Event]:
        self._begun = True
        events = self.push("")
        rest, self._text = self._text, ""
        if self._inside:
            events += self._close(rest, "")
        elif rest:
            events += self._gate.content(rest)
        return events + self._gate.finish()

    def _step(self) -> list[Event] | None:
        """Events of the next stretch of one kind; None if more text is needed."""
        if not self._begin() or not self._text:
            return None
        return self._in_call() if self._inside else self._in_content()

    def _begin(self) -> bool:
        """Whether it is known how the text begins; a bare call opens without a mark."""
        if self._begun:
            return True
        bare = self._format.bare
        assert bare is not None
        start = self._text.lstrip()
        if bare.match(start):
            self._begun = self._inside = True
        elif not _may_begin(start):
            self._begun = True
        return self._begun

    def _in_content(self) -> list[Event] | None:
        found = first_mark(self._text, self._marks)
        if found is None:
            certain = before_mark(self._text, self._marks)
            text, self._text = self._text[:certain], self._text[certain:]
            return self._gate.content(text) if text else None
        at, mark = found
        text, self._text = self._text[:at], self._text[at + len(mark) :]
        if mark == self._format.opens or mark in self._format.also:
            self._open, self._inside = mark, True
        return self._gate.content(text)

    def _in_call(self) -> list[Event] | None:
        closes = self._format.also.get(self._open, self._format.closes)
        if closes is None or (at := self._text.find(closes)) < 0:
            return None
        body, self._text = self._text[:at], self._text[at + len(closes) :]
        return self._close(body, closes)

    def _close(self, body: str, mark: str) -> list[Event]:
        raw, self._open, self._inside = self._open + body + mark, "", False
        calls = self._format.read(raw if self._format.whole else self._without_dropped(body))
        return self._gate.calls(calls) if calls else self._gate.content(raw)

    def _without_dropped(self, body: str) -> str:
        for mark in self._format.dropped:
            body = body.replace(mark, "")
        return body


def _may_begin(start: str) -> bool:
    """Whether more text is needed to tell how a JSON object begins."""
    return len(start) < 32 and re.fullmatch(r'(\{\s*("\w*)?)?', start) is not None


# ---- what stands between the marks --------------------------------------------------------


def _read_object(body: str) -> list[Call] | None:
    """Hermes, Qwen: {"name": …, "arguments": …}."""
    call = from_object(parse_json(body))
    return None if call is None else [call]


def _read_objects(body: str) -> list[Call] | None:
    """Llama 3: objects one after the other, some with a semicolon between."""
    calls: list[Call | None] = []
    rest = body.strip()
    while rest:
        value, rest = _decode(rest)
        calls.append(from_object(value))
        rest = rest.lstrip().removeprefix(";").lstrip()
    return _all_or_none(calls)


def _read_mistral(body: str) -> list[Call] | None:
    """A list of objects; since 2025 `name[ARGS]{…}`, each after a mark of its own."""
    value = parse_json(body)
    if isinstance(value, list):
        return _all_or_none([from_object(item) for item in cast("list[Any]", value)])
    calls: list[Call | None] = []
    for part in body.split("[TOOL_CALLS]"):
        name, _, arguments = part.partition("{")
        name = name.partition("[CALL_ID]")[0].removesuffix("[ARGS]").strip()
        calls.append(Call.of(name, "{" + arguments.strip()))
    return _all_or_none(calls)


def _read_deepseek(body: str) -> list[Call] | None:
    """V3: `function<sep>name` and fenced JSON; since V3.1 `name<sep>` and the JSON."""
    kind, sep, rest = body.partition("<｜tool▁sep｜>")
    if not sep:
        return None
    if fenced := re.fullmatch(r"([^\n]+)\n```json\n(.*?)\n?```\s*", rest, re.DOTALL):
        return _all_or_none([Call.of(fenced[1].strip(), fenced[2])])
    return _all_or_none([Call.of(kind.strip(), rest.strip())])


def _decode(text: str) -> tuple[Any, str]:
    """The JSON value that the text begins with, and the rest; (None, "") if there is none."""
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None, ""
    return value, text[end:]


def _all_or_none(calls: list[Call | None]) -> list[Call] | None:
    found = [call for call in calls if call is not None]
    return found if found and len(found) == len(calls) else None


FORMATS = {
    "hermes": Format("<tool_call>", "</tool_call>", _read_object),
    "llama3_json": Format(
        "<|python_tag|>",
        None,
        _read_objects,
        dropped=("<|eom_id|>", "<|eot_id|>"),
        needs_special_tokens=True,
        bare=re.compile(r'\{\s*"(name|type|function|parameters|arguments)"'),
    ),
    "mistral": Format(
        "[TOOL_CALLS]", None, _read_mistral, dropped=("</s>",), needs_special_tokens=True
    ),
    "deepseek_v3": Format(
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        _read_deepseek,
        dropped=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜end▁of▁sentence｜>"),
        needs_special_tokens=True,
    ),
    "qwen3_coder": Format(
        "<tool_call>",
        "</tool_call>",
        partial(read_xml, schemas={}),
        dropped=("</tool_call>",),
        also={"<function=": "</function>"},  # it forgets the first mark at times
        whole=True,
    ),
}


def format_of(name: str, schemas: Schemas) -> Format:
    """A format by its name, for these tools: not every notation shows what type a value has."""
    form = FORMATS[name]
    return replace(form, read=partial(read_xml, schemas=schemas)) if form.whole else form
