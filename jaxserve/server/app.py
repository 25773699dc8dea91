"""The app: the route table, and what stands before it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as StarletteRoute

from jaxserve.errors import ConfigError
from jaxserve.server import (
    anthropic,
    chat,
    completions,
    embeddings,
    messages,
    openai,
    openai_responses,
    responses,
    status,
    tokens,
)
from jaxserve.server.endpoint import Endpoint, Route
from jaxserve.server.errors import as_api_error
from jaxserve.server.gate import Gate, KeyCheck
from jaxserve.server.metrics import Metrics
from jaxserve.server.parsing import Notation
from jaxserve.server.schema import openapi
from jaxserve.server.state import Exchange, Limits, Server
from jaxserve.server.wire import json_response


async def show_openapi(_exchange: Exchange, _body: None) -> Response:
    """Handles `GET /openapi.json`."""
    return Response(openapi(ENDPOINTS), media_type="application/json")


ENDPOINTS = (
    Endpoint(
        "/v1/completions",
        completions.completions,
        openai.Completion,
        openai.CompletionRequest,
        streams=True,
    ),
    Endpoint(
        "/v1/chat/completions",
        chat.chat_completions,
        openai.ChatCompletion,
        openai.ChatRequest,
        streams=True,
    ),
    Endpoint(
        "/v1/responses",
        responses.responses,
        openai_responses.ResponseObject,
        openai_responses.ResponsesRequest,
        tidy=openai_responses.tidy,
        streams=True,
    ),
    Endpoint(
        "/v1/messages",
        messages.messages,
        anthropic.AnthropicMessage,
        anthropic.MessagesRequest,
        streams=True,
    ),
    Endpoint(
        "/v1/messages/count_tokens",
        messages.count_tokens,
        anthropic.TokenCount,
        anthropic.CountTokensRequest,
    ),
    Endpoint("/v1/embeddings", embeddings.embeddings, openai.Embeddings, openai.EmbeddingRequest),
    Endpoint("/v1/models", status.models, openai.Models),
    Endpoint("/v1/models/{id:path}", status.model, openai.Model),
    Endpoint("/tokenize", tokens.tokenize, tokens.Tokenized, tokens.TokenizeRequest),
    Endpoint("/detokenize", tokens.detokenize, tokens.Detokenized, tokens.DetokenizeRequest),
    Endpoint("/tokenizer_info", tokens.tokenizer_info, tokens.TokenizerInfo),
    Endpoint("/version", status.show_version, status.Version),
    Endpoint("/load", status.load, status.Load),
    Endpoint("/health", status.health, status.Health),
    Endpoint("/metrics", status.metrics),
    Endpoint("/openapi.json", show_openapi, dict[str, Any]),
)
"""Every route. The table is fixed; what differs between apps hangs on `app.state`."""


def create_app(
    llm: Any,
    *,
    api_key: str | Sequence[str] | None = None,
    served_model_name: str | Sequence[str] | None = None,
    limits: Limits | None = None,
    tool_call_parser: str | None = None,
    reasoning_parser: str | None = None,
) -> Starlette:
    """An app that serves `llm`; the caller keeps owning and shutting down the engine.

    Args:
        llm: the engine's facade, as `jaxserve.llm.LLM`.
        api_key: clients must send it, or one of them; None lets everybody in.
        served_model_name: what requests may call the model; `llm.model_name` if None.
        limits: what one client may ask for.
        tool_call_parser: name of the parser for tool calls; by the model's type and chat template
            if None.
        reasoning_parser: name of the parser for reasoning; by the model's type if None.

    Raises:
        ConfigError: the model has no tokenizer, or a setting cannot work.
    """
    if llm.tokenizer is None:
        raise ConfigError("a server needs the model's tokenizer; load it without tokenizer=False")
    limits = limits or Limits()
    names = _names(served_model_name) or (llm.model_name,)
    server = Server(
        llm=llm,
        names=names,
        limits=limits,
        gate=Gate(limits.max_concurrent_requests),
        metrics=Metrics(llm, names[0]),
        created=int(time.time()),
        notation=Notation.of(
            llm.model_type,
            tool_call_parser,
            reasoning_parser,
            "\n".join(llm.tokenizer.chat_templates.values()),
        ),
    )
    keys = _names(api_key)
    app = Starlette(
        routes=[
            StarletteRoute(e.path, Route(e, server), methods=[e.method], name=e.handler.__name__)
            for e in ENDPOINTS
        ],
        middleware=[Middleware(KeyCheck, keys=keys)] if keys else [],
        exception_handlers={HTTPException: _failed, Exception: _failed},
    )
    app.state.server = server
    return app


def _names(given: str | Sequence[str] | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())


async def _failed(request: Request, error: Exception) -> Response:
    failure = as_api_error(error)
    if isinstance(error, HTTPException):  # Starlette's own: no such route, or another method
        failure.message += (
            f": {request.method} {request.url.path}; see /openapi.json for the routes"
        )
    return json_response(failure.body(request.url.path), failure.status, failure.headers)
