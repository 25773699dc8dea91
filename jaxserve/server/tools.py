"""Tool calls: which are allowed, how they are enforced, and how they are read back.

A tool that must be called (`required`, or one that is named) is enforced by a JSON schema on the
whole output, which works for any model. With `auto` the model writes calls in its own notation and
the model's parser reads them; `strict` then becomes a grammar of text with such calls in it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxserve.errors import RequestError
from jaxserve.request import StructuredOutputs
from jaxserve.server.openai import Function
from jaxserve.server.parsing import Notation, Reader
from jaxserve.server.pieces import CallDelta, FirstCallOnly, Parsed, Plain


@dataclass(frozen=True)
class ToolUse:
    """What a request says about tools, whichever API it came through.

    Attributes:
        functions: those that may be called.
        choice: "none", "auto", "required" or the name of a function.
        parallel: whether several calls may be made.
        named: whether `choice` is the name of a function.
    """

    functions: Sequence[Function] = ()
    choice: str = "none"
    parallel: bool = True
    named: bool = False

    @classmethod
    def of(
        cls,
        functions: Sequence[Function] | None,
        choice: str | None,
        named: str | None = None,
        parallel: bool | None = None,
    ) -> ToolUse:
        """Checks that the choice and the functions fit each other."""
        functions = functions or ()
        wanted = named or choice or ("auto" if functions else "none")
        names = [function.name for function in functions]
        if wanted not in ("none", "auto") and not functions:
            raise RequestError(f"tool_choice={wanted!r} needs tools; send some", "tool_choice")
        if named is not None and named not in names:
            raise RequestError(
                f"tool_choice names {named!r}, which is not among the tools {names}", "tool_choice"
            )
        if len(set(names)) < len(names):
            raise RequestError(f"tools have the same name twice: {names}", "tools")
        return cls(functions, wanted, parallel is not False, named is not None)

    @property
    def forced(self) -> bool:
        """Whether a tool must be called."""
        return self.named or self.choice == "required"

    def for_template(self) -> list[dict[str, Any]] | None:
        """The tools as chat templates read them; None if the model is to know of none."""
        if not (self.forced or self.may_choose):
            return None
        return [{"type": "function", "function": _plain(f)} for f in self.functions]

    @property
    def may_choose(self) -> bool:
        """Whether the model decides if a tool is called."""
        return self.choice == "auto" and not self.named and bool(self.functions)

    def constraint(self, notation: Notation) -> StructuredOutputs | None:
        """What enforces a call, or the arguments of strict functions; None if nothing does."""
        if self.named:
            (function,) = (f for f in self.functions if f.name == self.choice)
            return StructuredOutputs(json=json.dumps(_parameters(function) | _COMPACT))
        if self.forced:
            return StructuredOutputs(json=json.dumps(_calls_schema(self.functions, self.parallel)))
        strict = [i for i, function in enumerate(self.functions) if function.strict]
        if not (self.may_choose and strict):
            return None
        if notation.tools != "hermes":
            name = self.functions[strict[0]].name
            raise RequestError(
                f"tools[{strict[0]}] ({name!r}): strict=true cannot be honoured in this model's "
                "notation of calls; send tool_choice 'required', name the function, or drop strict",
                f"tools[{strict[0]}].function.strict",
            )
        return StructuredOutputs(grammar=_hermes_grammar(self.functions, self.parallel))

    def reader(self, notation: Notation, constrained: bool) -> Reader:
        """What reads the answers.

        Args:
            constrained: whether the request constrains the output in another way; such an output
                is plain text, but for reasoning before it.
        """
        if self.named:
            return notation.constrained_reader(lambda: NamedCall(self.choice))
        if self.forced:
            return notation.constrained_reader(ListedCalls)
        if constrained and self.may_choose:
            raise RequestError(
                "a constrained output leaves no room for tool calls; send tool_choice 'none', or "
                "no constraint",
                "tools",
            )
        if constrained:
            return notation.constrained_reader(Plain)
        if self.may_choose and notation.tools is None:
            raise RequestError(
                "this server cannot tell how the model writes tool calls; start it with "
                "--tool-call-parser, or enforce a call by tool_choice",
                "tools",
            )
        schemas = {function.name: _parameters(function) for function in self.functions}
        reader = notation.reader(schemas if self.may_choose else None)
        if self.parallel or not self.may_choose:
            return reader
        return replace(reader, make=lambda prompt: FirstCallOnly(reader.make(prompt)))


def _plain(function: Function) -> dict[str, Any]:
    plain: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        plain["description"] = function.description
    plain["parameters"] = _parameters(function)
    return plain


def _parameters(function: Function) -> dict[str, Any]:
    return function.parameters or {"type": "object", "properties": {}}


_COMPACT = {
    "x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
}
"""Writes JSON as `json.dumps` does: a model forced into white space may never leave it."""


def _calls_schema(functions: Sequence[Function], parallel: bool) -> dict[str, Any]:
    """A list of calls. Each function's schema moves under `$defs`, and its references with it."""
    schema: dict[str, Any] = {
        "type": "array",
        "minItems": 1,
        "items": {"anyOf": [_call_schema(f) for f in functions]},
        **_COMPACT,
        "$defs": {f.name: _moved(_parameters(f), f"#/$defs/{f.name}") for f in functions},
    }
    if not parallel:
        schema["maxItems"] = 1
    return schema


def _call_schema(function: Function) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "name": {"const": function.name},
            "arguments": {"$ref": f"#/$defs/{function.name}"},
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, root: str) -> Any:
    """`schema` with its local references made relative to `root`."""
    if isinstance(schema, list):
        return [_moved(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: root + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _moved(value, root)
        for key, value in schema.items()
    }


def _hermes_grammar(functions: Sequence[Function], parallel: bool) -> str:
    """Text in which every `<tool_call>` is followed by a valid call, in llguidance's Lark.

    A tag may be spelled or be one token. Neither a literal nor TEXT matches such a token: it has to
    be named, on a line that `compile_grammar` drops for a tokenizer without it.
    """
    calls = " | ".join(f"call_{i}" for i in range(len(functions)))
    rules = [f"start: ({calls}){'*' if parallel else '?'} text", "text: TEXT", "TEXT: /(.|\\n)*/"]
    rules.append('spelled[lazy]: TEXT "<tool_call>"')
    rules.append("opened: spelled\n| TEXT <tool_call>")
    rules.append('closed: "</tool_call>"\n| </tool_call>')
    for i, function in enumerate(functions):
        head = json.dumps(f'\n{{"name": {json.dumps(function.name)}, "arguments": ')
        schema = json.dumps(_parameters(function) | _COMPACT)
        rules.append(f'call_{i}: opened {head} %json {schema} "}}\\n" closed')
    return "\n".join(rules)


class NamedCall:
    """The whole output is the arguments of one function."""

    def __init__(self, name: str):
        self._name: str | None = name

    def feed(self, text: str) -> Parsed:
        name, self._name = self._name, None
        return Parsed(calls=[CallDelta(0, text, name)] if text or name else [])

    def finish(self) -> Parsed:
        return Parsed()


class ListedCalls:
    """The output is a JSON list of `{"name": …, "arguments": …}`, handed out call by call."""

    def __init__(self) -> None:
        self._held = ""
        self._count = 0

    def feed(self, text: str) -> Parsed:
        self._held += text
        found: list[CallDelta] = []
        while "}" in text and (call := self._take()) is not None:
            found.append(call)
        return Parsed(calls=found)

    def finish(self) -> Parsed:
        return Parsed()

    def _take(self) -> CallDelta | None:
        held = self._held.lstrip(" \t\r\n[,")
        try:
            call, end = _decoder.raw_decode(held)
        except ValueError:
            return None
        if not isinstance(call, dict):
            return None
        self._held, self._count = held[end:], self._count + 1
        return CallDelta(self._count - 1, json.dumps(call["arguments"]), call["name"])


_decoder = json.JSONDecoder()
