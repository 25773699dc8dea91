"""Qwen3-Coder's tool calls: values stand as plain text between tags, and schemas say their types.

<tool_call>
<function=get_weather>
<parameter=city>
Oslo
</parameter>
</function>
</tool_call>
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any, cast

from jaxserve.text.parsers.events import Call

Schemas = Mapping[str, Any]
"""The JSON schema of each function's parameters, by the function's name."""

_OPEN = re.compile(r"\s*(?:<tool_call>)?\s*")
_HEAD = re.compile(r"\s*<function=([^>\n]+)>")


def _parameter(next_tags: str) -> re.Pattern[str]:
    closed = r"</parameter>(?=\s*(?:<parameter=|</function>|</tool_call>))"
    return re.compile(
        rf"\s*<parameter=([^>\n]+)>\n?(.*?)(?:\n?{closed}|\n(?={next_tags}))", re.DOTALL
    )


_STRICT = _parameter("<parameter=")
_FORGETFUL = _parameter("<parameter=|</function>|</tool_call>")
"""A parameter. Its value may hold tags as text, and ends where one follows that cannot be its own.

The model forgets the closing tag at times; without one, the last value of a call is only looked for
if nothing else makes sense, since files hold `</function>` too.
"""

_TAIL = re.compile(r"\s*(?:</function>|(?=</tool_call>))")
_CLOSE = re.compile(r"\s*(?:</tool_call>)?\s*")

_SYNONYMS = {
    "str": "string", "text": "string", "int": "integer", "long": "integer", "float": "number",
    "double": "number", "bool": "boolean", "dict": "object", "list": "array", "tuple": "array",
}  # fmt: skip
"""What tools that were described by hand call JSON's types."""

_UNREADABLE = object()


def read_xml(text: str, schemas: Schemas) -> list[Call] | None:
    """The calls in a text, its marks included; None unless all of it is whole calls."""
    return _read(text, schemas, _STRICT) or _read(text, schemas, _FORGETFUL)


def _read(text: str, schemas: Schemas, parameter: re.Pattern[str]) -> list[Call] | None:
    at = _end(_OPEN.match(text))
    calls: list[Call] = []
    while head := _HEAD.match(text, at):
        name = head[1].strip()
        schema = schemas.get(name)
        arguments: dict[str, Any] = {}
        at = head.end()
        while found := parameter.match(text, at):
            key = found[1].strip()
            arguments[key] = typed(found[2], _of_property(schema, key), schema)
            at = found.end()
        if (tail := _TAIL.match(text, at)) is None:
            return None  # cut short, or something else altogether
        at = tail.end()
        calls.append(Call(name, json.dumps(arguments, ensure_ascii=False)))
    return calls if calls and _CLOSE.fullmatch(text, at) else None


def _end(match: re.Match[str] | None) -> int:
    return match.end() if match else 0


def _of_property(schema: Any, key: str) -> Any:
    """The schema of one parameter; None if it has none."""
    match schema:
        case {"properties": {**properties}} if key in properties:
            return properties[key]
        case {"additionalProperties": {**rest}}:
            return rest
        case _:
            return None


# ---- types ---------------------------------------------------------------------------------


def typed(text: str, schema: Any, root: Any = None) -> Any:
    """A value of one of the types that the schema allows; the text itself if it is of none.

    Args:
        root: where the schema's local references lead.
    """
    kinds = _kinds(schema, root)
    if text.lower() in ("null", "none") and ("null" in kinds or (kinds and "string" not in kinds)):
        return None
    if not kinds - {"string"}:
        return text
    if "boolean" in kinds and text.strip().lower() in ("true", "false"):
        return text.strip().lower() == "true"
    value = _literal(text)
    if isinstance(value, str) and kinds & {"object", "array"}:
        value = _literal(value)  # some templates taught models to quote them twice
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    return value if _kinds_of(value) & kinds else text


def _kinds(schema: Any, root: Any, depth: int = 0) -> set[str]:
    """JSON's names of the types that a schema allows; none if it does not say."""
    if not isinstance(schema, Mapping) or depth > 16:  # a reference may lead to itself
        return set()
    schema = cast("Mapping[str, Any]", schema)
    if isinstance(reference := schema.get("$ref"), str):
        return _kinds(_resolve(reference, root), root, depth + 1)
    if given := schema.get("type"):
        names = cast("list[Any]", given if isinstance(given, list) else [given])
        return {_SYNONYMS.get(str(name).lower(), str(name).lower()) for name in names}
    if "const" in schema or isinstance(schema.get("enum"), list):
        values: list[Any] = schema.get("enum") or [schema.get("const")]
        return set[str]().union(*map(_kinds_of, values))
    options = [s for key in ("anyOf", "oneOf", "allOf") for s in schema.get(key) or ()]
    return set[str]().union(*(_kinds(option, root, depth + 1) for option in options))


def _resolve(reference: str, root: Any) -> Any:
    """What `#/$defs/Days` names; None if there is no such place."""
    for key in reference.removeprefix("#").split("/")[1:]:
        root = cast("Any", root).get(key) if isinstance(root, Mapping) else None
    return root


def _kinds_of(value: Any) -> set[str]:
    match value:
        case bool():
            return {"boolean"}
        case int():
            return {"integer", "number"}
        case float():
            return {"number"}
        case str():
            return {"string"}
        case list():
            return {"array"}
        case dict():
            return {"object"}
        case None:
            return {"null"}
        case _:
            return set()


def _literal(text: str) -> Any:
    """The value that a text spells in JSON or, as models do, in Python."""
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError):
        pass
    try:  # through JSON, which has no sets, bytes or tuples
        return json.loads(json.dumps(ast.literal_eval(text.strip()), allow_nan=False))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return _UNREADABLE


def _finite(text: str) -> float:
    if (value := float(text)) in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is too large")
    return value


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
