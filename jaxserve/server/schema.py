"""`/openapi.json`, written from the route table and its structs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import msgspec

from jaxserve import __version__
from jaxserve.server.endpoint import Endpoint
from jaxserve.server.errors import AnthropicErrorBody, ErrorBody

_ERRORS = {
    "400": "The request cannot be honoured; the message says why and what to change.",
    "401": "No API key, or a wrong one.",
    "404": "No such model or route.",
    "413": "The body is too large.",
    "429": "Too many requests at once; retry later.",
    "500": "The server failed, or the controller of a search; the message says how.",
    "503": "The server is shutting down.",
}

_EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}


@lru_cache(maxsize=8)
def openapi(endpoints: tuple[Endpoint, ...]) -> bytes:
    """The OpenAPI 3.1 document of these routes, as JSON."""
    types = _types(endpoints)
    refs, components = msgspec.json.schema_components(
        types, ref_template="#/components/schemas/{name}"
    )
    ref_of = dict(zip(types, refs, strict=True))
    paths = {
        e.path.replace(":path", ""): {e.method.lower(): _operation(e, ref_of)} for e in endpoints
    }
    document = {
        "openapi": "3.1.0",
        "info": {"title": "jaxserve", "version": __version__},
        "paths": paths,
        "components": {"schemas": components},
    }
    return msgspec.json.encode(document)


def _types(endpoints: Sequence[Endpoint]) -> list[Any]:
    found: dict[Any, None] = {ErrorBody: None, AnthropicErrorBody: None}
    for endpoint in endpoints:
        found |= {kind: None for kind in (endpoint.body, endpoint.answer) if kind is not None}
    return list(found)


def _operation(endpoint: Endpoint, ref_of: dict[Any, Any]) -> dict[str, Any]:
    failure = AnthropicErrorBody if endpoint.path.startswith("/v1/messages") else ErrorBody
    operation: dict[str, Any] = {
        "operationId": endpoint.handler.__name__,
        "summary": (endpoint.handler.__doc__ or "").removesuffix("."),
        "responses": {
            "200": {"description": "The answer.", "content": _answers(endpoint, ref_of)},
            **{status: _failure(text, ref_of[failure]) for status, text in _ERRORS.items()},
        },
    }
    if endpoint.body is not None:
        content = {"application/json": {"schema": ref_of[endpoint.body]}}
        operation["requestBody"] = {"required": True, "content": content}
    if names := re.findall(r"{(\w+)(?::path)?}", endpoint.path):
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in names
        ]
    return operation


def _answers(endpoint: Endpoint, ref_of: dict[Any, Any]) -> dict[str, Any]:
    if endpoint.answer is None:
        return {"text/plain": {"schema": {"type": "string"}}}
    content: dict[str, Any] = {"application/json": {"schema": ref_of[endpoint.answer]}}
    if endpoint.streams:
        content["text/event-stream"] = {"schema": _EVENT}
    return content


def _failure(text: str, ref: Any) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": ref}}}
