"""What the engine's deltas become before a protocol formats them: pieces, and whole answers."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Literal, Protocol

from jaxserve.request import TokenLogprobs

FinishReason = Literal["stop", "length", "tool_calls", "abort"]
"""Why a choice ended: the engine's reasons, and one that a parser finds out."""


@dataclass(slots=True)
class CallDelta:
    """What has been added to a tool call. The first delta of a call carries its name."""

    index: int
    arguments: str = ""
    name: str | None = None
    id: str | None = None  # given to the first delta on its way out


@dataclass(slots=True)
class Parsed:
    """Text, told apart."""

    text: str = ""
    reasoning: str = ""
    calls: list[CallDelta] = field(default_factory=list)

    def __add__(self, other: Parsed) -> Parsed:
        return Parsed(
            self.text + other.text, self.reasoning + other.reasoning, self.calls + other.calls
        )


class Parser(Protocol):
    """Tells one choice's text apart while it grows."""

    def feed(self, text: str) -> Parsed:
        """What `text` settles; the rest is held back."""
        ...

    def finish(self) -> Parsed:
        """What was held back."""
        ...


class Plain:
    """All of it is text."""

    def feed(self, text: str) -> Parsed:
        return Parsed(text)

    def finish(self) -> Parsed:
        return Parsed()


class FirstCallOnly:
    """`parallel_tool_calls=false`: lets through the first call of another parser."""

    def __init__(self, inner: Parser):
        self._inner = inner

    def feed(self, text: str) -> Parsed:
        return _first_call(self._inner.feed(text))

    def finish(self) -> Parsed:
        return _first_call(self._inner.finish())


def _first_call(parsed: Parsed) -> Parsed:
    parsed.calls = [call for call in parsed.calls if call.index == 0]
    return parsed


@dataclass(slots=True)
class Piece:
    """What one choice has gained: the one currency that every protocol formats."""

    index: int
    text: str = ""
    reasoning: str = ""
    calls: list[CallDelta] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def visible(self) -> bool:
        """Whether a stream has anything to show for it."""
        return bool(self.text or self.reasoning or self.calls or self.finish_reason)


@dataclass(slots=True)
class Call:
    """A whole tool call."""

    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Answer:
    """A whole choice: its pieces added up."""

    index: int
    text: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def add(self, piece: Piece) -> None:
        """Appends what `piece` brings."""
        self.text += piece.text
        self.reasoning += piece.reasoning
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs or []
        self.finish_reason, self.stop_reason = piece.finish_reason, piece.stop_reason
        for delta in piece.calls:
            if delta.name is not None:
                self.calls.append(Call(delta.id or "", delta.name))
            self.calls[-1].arguments += delta.arguments


def new_id(prefix: str) -> str:
    """A name that is not used twice, such as `call_4f…`."""
    return f"{prefix}{uuid.uuid4().hex[:24]}"
