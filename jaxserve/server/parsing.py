"""The model's own notation for reasoning and tool calls, read by its parser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxserve.server.pieces import CallDelta, Parsed, Parser, Plain
from jaxserve.text.parsers import Content, Event, OutputParser, Reasoning, make_parser, parsers_of


@dataclass(frozen=True)
class Notation:
    """How a model writes what is not plain text.

    Attributes:
        tools: name of the parser for tool calls; None if the server cannot read them.
        reasoning: name of the parser for reasoning; None if the model does not show any.
    """

    tools: str | None
    reasoning: str | None

    @classmethod
    def of(cls, model_type: str, tools: str | None, reasoning: str | None) -> Notation:
        """The notation asked for, or else the family's; raises ConfigError for an unknown name."""
        known_tools, known_reasoning = parsers_of(model_type)
        found = cls(tools or known_tools, reasoning or known_reasoning)
        make_parser(found.tools, found.reasoning)
        return found

    def reader(self, with_tools: bool) -> Reader:
        """Reads reasoning, and tool calls where some may be made."""
        tools = self.tools if with_tools else None

        def make(prompt: str | None) -> Parser:
            return ModelParser(make_parser(tools, self.reasoning, prompt))

        return Reader(make, make_parser(tools, self.reasoning).needs_special_tokens)


@dataclass(frozen=True)
class Reader:
    """What tells the text of a request's choices apart.

    Attributes:
        make: a parser for one choice, given the prompt's text.
        needs_special_tokens: the parser looks for special tokens, so they must be shown to it.
    """

    make: Callable[[str | None], Parser]
    needs_special_tokens: bool = False


PLAIN = Reader(lambda prompt: Plain())
"""All of it is text."""


class ModelParser:
    """An `OutputParser` of `jaxserve.text` as a `Parser`."""

    def __init__(self, inner: OutputParser):
        self._inner = inner
        self._named: set[int] = set()

    def feed(self, text: str) -> Parsed:
        return self._sorted(self._inner.push(text))

    def finish(self) -> Parsed:
        return self._sorted(self._inner.finish())

    def _sorted(self, events: Sequence[Event]) -> Parsed:
        parsed = Parsed()
        for event in events:
            match event:
                case Content(text):
                    parsed.text += text
                case Reasoning(text):
                    parsed.reasoning += text
                case call:
                    name = None if call.index in self._named else call.name
                    self._named.add(call.index)
                    parsed.calls.append(CallDelta(call.index, call.arguments_delta, name))
        return parsed
