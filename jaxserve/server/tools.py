"""Tool calls: which are allowed, how they are enforced, and how they are read back.

A tool that must be called (`required`, or one that is named) is enforced by a JSON schema on the
whole output, which works for any model. With `auto` the model writes calls in its own notation
and the model's parser reads them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.errors import RequestError
from jaxserve.request import StructuredOutputs
from jaxserve.server.openai import Function
from jaxserve.server.parsing import model_parser, tool_parser_missing
from jaxserve.server.pieces import CallDelta, FirstCallOnly, Parsed, Parser, Plain
from jaxserve.server.state import Server


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
        use = cls(functions, wanted, parallel is not False, named is not None)
        use._check_strict()
        return use

    @property
    def forced(self) -> bool:
        """Whether a tool must be called."""
        return self.named or self.choice == "required"

    def for_template(self) -> list[dict[str, Any]] | None:
        """The tools as chat templates read them; None if the model is to know of none."""
        if self.choice == "none" or not self.functions:
            return None
        return [{"type": "function", "function": _plain(f)} for f in self.functions]

    def constraint(self) -> StructuredOutputs | None:
        """The schema that enforces a call; None if nothing is enforced."""
        if self.named:
            (function,) = (f for f in self.functions if f.name == self.choice)
            return StructuredOutputs(json=json.dumps(_parameters(function)))
        if self.forced:
            return StructuredOutputs(json=json.dumps(_calls_schema(self.functions, self.parallel)))
        return None

    def parsers(self, server: Server, constrained: bool) -> Callable[[], Parser]:
        """What makes a parser for each choice.

        Args:
            constrained: whether the request constrains the output in another way; such an output
                is plain text from its first character.
        """
        if self.named:
            return lambda: NamedCall(self.choice)
        if self.forced:
            return ListedCalls
        with_tools = self.choice == "auto" and bool(self.functions)
        if constrained and with_tools:
            raise RequestError(
                "a constrained output leaves no room for tool calls; send tool_choice 'none', or "
                "no response_format",
                "tools",
            )
        if constrained:
            return Plain
        if with_tools and (why := tool_parser_missing(server)):
            raise RequestError(why, "tools")
        make = model_parser(server, self.for_template() if with_tools else None)
        return make if self.parallel else lambda: FirstCallOnly(make())

    def _check_strict(self) -> None:
        for i, function in enumerate(self.functions):
            if function.strict and self.choice == "auto":
                raise RequestError(
                    f"tools[{i}] ({function.name!r}): strict=true is honoured when the call is "
                    "enforced; send tool_choice 'required' or name the function, or drop strict",
                    f"tools[{i}].function.strict",
                )


def _plain(function: Function) -> dict[str, Any]:
    plain: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        plain["description"] = function.description
    plain["parameters"] = _parameters(function)
    return plain


def _parameters(function: Function) -> dict[str, Any]:
    return function.parameters or {"type": "object", "properties": {}}


def _calls_schema(functions: Sequence[Function], parallel: bool) -> dict[str, Any]:
    """A list of calls. Each function's schema moves under `$defs`, and its references with it."""
    schema: dict[str, Any] = {
        "type": "array",
        "minItems": 1,
        "items": {"anyOf": [_call_schema(f) for f in functions]},
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
