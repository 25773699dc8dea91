"""The model's own notation for reasoning and tool calls, read by its parser."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.server.pieces import CallDelta, Parsed, Parser, Plain
from jaxserve.text.parsers import (
    TAGGED_REASONING,
    Content,
    Event,
    OutputParser,
    Reasoning,
    make_parser,
    parsers_of,
)


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
    def of(
        cls, model_type: str, tools: str | None, reasoning: str | None, chat_template: str = ""
    ) -> Notation:
        """The notation asked for, or else the model's; raises ConfigError for an unknown name."""
        known_tools, known_reasoning = parsers_of(model_type, chat_template)
        found = cls(tools or known_tools, reasoning or known_reasoning)
        make_parser(found.tools, found.reasoning)
        return found

    def reader(self, schemas: Mapping[str, Any] | None) -> Reader:
        """Reads reasoning, and tool calls where some may be made.

        Args:
            schemas: of the parameters of each function that may be called; None if none may.
        """
        tools = None if schemas is None else self.tools

        def make(prompt: str | None) -> Parser:
            return ModelParser(make_parser(tools, self.reasoning, prompt, schemas))

        special = make_parser(tools, self.reasoning).needs_special_tokens
        return Reader(make, special, self._reasons)

    def constrained_reader(self, answer: Callable[[], Parser]) -> Reader:
        """Reads reasoning, and by `answer` what a constraint makes of the rest.

        Reasoning in another form than between tags has no place beside a constraint.
        """
        if not self._reasons:
            return Reader(lambda prompt: answer())

        def make(prompt: str | None) -> Parser:
            return ReasoningFirst(ModelParser(make_parser(None, self.reasoning, prompt)), answer())

        return Reader(make, reasons=True)

    @property
    def _reasons(self) -> bool:
        return self.reasoning in TAGGED_REASONING


@dataclass(frozen=True)
class Reader:
    """What tells the text of a request's choices apart.

    Attributes:
        make: a parser for one choice, given the prompt's text.
        needs_special_tokens: the parser looks for special tokens, so they must be shown to it.
        reasons: reasoning is told apart, and no constraint of the output concerns it.
    """

    make: Callable[[str | None], Parser]
    needs_special_tokens: bool = False
    reasons: bool = False


PLAIN = Reader(lambda prompt: Plain())
"""All of it is text."""


class ReasoningFirst:
    """Shows the text of one parser, which finds the reasoning, to another, which reads the answer.

    The second is not asked before the answer begins: a tool call that is enforced would start.
    """

    def __init__(self, reasoning: Parser, answer: Parser):
        self._reasoning, self._answer = reasoning, answer

    def feed(self, text: str) -> Parsed:
        return self._split(self._reasoning.feed(text))

    def finish(self) -> Parsed:
        return self._split(self._reasoning.finish()) + self._answer.finish()

    def _split(self, found: Parsed) -> Parsed:
        answer = self._answer.feed(found.text) if found.text else Parsed()
        return Parsed(reasoning=found.reasoning) + answer


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
