"""JSON in and out: strict decoding that names the field at fault."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Annotated, Any, ClassVar, TypeVar

import msgspec
from msgspec import Meta, Struct
from starlette.responses import Response

from jaxserve.errors import RequestError

INT32_MAX = 2**31 - 1
Count = Annotated[int, Meta(ge=0, le=INT32_MAX)]
"""A whole number that fits the device's integers."""

TokenId = Annotated[int, Meta(ge=0, le=INT32_MAX)]


class Body(Struct, kw_only=True, forbid_unknown_fields=True):
    """A request body: what it does not declare is refused, and so is what it cannot honour.

    `refused` maps a known field to the reason it is refused and the remedy; such a field may
    still carry its default, which asks for nothing.
    """

    refused: ClassVar[Mapping[str, str]] = {}


T = TypeVar("T", bound=Body)


def decode(data: bytes, kind: type[T], tidy: Callable[[Any], Any] | None = None) -> T:
    """The request in `data`, or a `RequestError` that names the field and the expectation.

    Args:
        data: the body as sent.
        kind: the struct expected.
        tidy: rewrites the plain JSON before it is typed, for fields with untagged variants.
    """
    try:
        if tidy is None:
            body = _decoder(kind).decode(data)
        else:
            body = msgspec.convert(tidy(msgspec.json.decode(data)), kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise _explained(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise RequestError("the body nests too deeply; send flatter JSON") from None
    _refuse(body)
    return body


@lru_cache(maxsize=64)
def _decoder(kind: type[Any]) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)


_PLACE = re.compile(r" - at `(?:key` in `)?\$\.?(?P<path>.*)`$")
_UNKNOWN = re.compile(r"unknown field `(?P<name>[^`]*)`")
_MISSING = re.compile(r"missing required field `(?P<name>[^`]*)`")


def _explained(message: str) -> RequestError:
    """msgspec's message as ours, with the path as the parameter."""
    place = _PLACE.search(message)
    path = place["path"] if place else ""
    what = message[: place.start()] if place else message
    if unknown := _UNKNOWN.search(message):
        name = _join(path, unknown["name"])
        return RequestError(f"unknown field `{name}`: it would have no effect; remove it", name)
    if missing := _MISSING.search(message):
        name = _join(path, missing["name"])
        return RequestError(f"`{name}` is required", name)
    return RequestError(f"`{path}`: {what}" if path else what, path or None)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _refuse(body: Body) -> None:
    for name, remedy in body.refused.items():
        value = getattr(body, name)
        if value is not None and value != _defaults(type(body))[name]:
            raise RequestError(f"{name}={value!r:.80} cannot be honoured: {remedy}", name)


@lru_cache(maxsize=64)
def _defaults(kind: type[Body]) -> dict[str, Any]:
    return {field.name: field.default for field in msgspec.structs.fields(kind)}


def json_response(
    body: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """`body`, a struct or plain JSON, as a response."""
    return Response(
        msgspec.json.encode(body), status, headers=headers, media_type="application/json"
    )
