"""What a model's text means: content, reasoning and tool calls."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any, Protocol, cast


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model thought aloud."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call, or what has been added to its arguments. `arguments_delta` is JSON text."""

    index: int
    id: str
    name: str
    arguments_delta: str


Event = Content | Reasoning | ToolCall


class OutputParser(Protocol):
    """Reads one completion, in any pieces.

    The events do not depend on where the text was cut, but for how much text each carries. A tool
    call arrives whole: only then is it known to be one.

    Attributes:
        needs_special_tokens: its marks are special tokens; decode with `skip_special_tokens=False`.
    """

    @property
    def needs_special_tokens(self) -> bool: ...

    def push(self, text_delta: str) -> list[Event]:
        """Events that this text completes."""
        ...

    def finish(self) -> list[Event]:
        """Events of the text still held back, when no more will come."""
        ...


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call as a parser finds it, before it is numbered."""

    name: str
    arguments: str

    @classmethod
    def of(cls, name: Any, arguments: Any) -> Call | None:
        """None unless a name and arguments that are an object, or the text of one."""
        if not isinstance(name, str) or not name:
            return None
        if isinstance(arguments, str):
            return cls(name, arguments) if isinstance(parse_json(arguments), dict) else None
        if not isinstance(arguments, dict):
            return None
        return cls(name, json.dumps(cast("dict[str, Any]", arguments), ensure_ascii=False))

    def event(self, index: int) -> ToolCall:
        return ToolCall(index, f"call_{uuid.uuid4().hex[:24]}", self.name, self.arguments)


def parse_json(text: str) -> Any:
    """The value, or None where the text is not JSON, however hostile."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def from_object(value: Any) -> Call | None:
    """The call that an object of name and arguments (or parameters) describes."""
    match value:
        case {"name": name, "arguments": arguments} | {"name": name, "parameters": arguments}:
            return Call.of(name, arguments)
        case {"name": name}:
            return Call.of(name, {})
        case _:
            return None
