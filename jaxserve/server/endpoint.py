"""One route: admit, read, decode, answer; every failure in the client's error shape."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxserve.errors import RequestError
from jaxserve.server.errors import ApiError, as_api_error
from jaxserve.server.sampling import constraint_field
from jaxserve.server.state import Exchange, Server
from jaxserve.server.stream import Disconnected, until_disconnect
from jaxserve.server.wire import decode, json_response

Handler = Callable[[Exchange, Any], Awaitable[Response]]


@dataclass(frozen=True)
class Endpoint:
    """A row of the route table; `/openapi.json` is written from it too.

    Attributes:
        path: Starlette's route pattern.
        handler: answers an exchange, given the decoded body (None for GET).
        answer: the struct answered with; None for text.
        body: the struct expected; None for GET.
        tidy: see `wire.decode`.
        streams: whether the answer may be server-sent events.
    """

    path: str
    handler: Handler
    answer: Any = None
    body: Any = None
    tidy: Callable[[Any], Any] | None = None
    streams: bool = False

    @property
    def method(self) -> str:
        return "GET" if self.body is None else "POST"


class Route:
    """An endpoint as an ASGI app."""

    def __init__(self, endpoint: Endpoint, server: Server):
        self._endpoint, self._server = endpoint, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        started = _Started(send)
        try:
            if self._endpoint.body is None:
                await self._answer(request, None, started)
            else:
                with self._server.gate.admit():
                    data = await _read(request, self._server.limits.max_body_bytes)
                    await until_disconnect(receive, self._answer(request, data, started))
        except (Disconnected, ClientDisconnect):
            return
        except Exception as error:
            if started.yes:
                raise
            failure = as_api_error(error)
            body = failure.body(scope["path"])
            await json_response(body, failure.status, failure.headers)(scope, receive, send)

    async def _answer(self, request: Request, data: bytes | None, send: Send) -> None:
        async with AsyncExitStack() as stack:
            exchange = Exchange(self._server, request, stack)
            body = None
            if data is not None:
                body = decode(data, self._endpoint.body, self._endpoint.tidy)
            try:
                response = await self._endpoint.handler(exchange, body)
            except RequestError as error:
                if error.param == "structured_outputs":
                    error.param = constraint_field(body)
                raise
            await response(request.scope, request.receive, send)


class _Started:
    """`send`, remembering whether the status line is out."""

    def __init__(self, send: Send):
        self._send, self.yes = send, False

    async def __call__(self, message: Any) -> None:
        self.yes = True
        await self._send(message)


async def _read(request: Request, limit: int) -> bytes:
    """The body, or 413 as soon as it is known to be longer than `limit`."""
    too_long = ApiError(
        413,
        f"the body is larger than {limit} bytes; send less, or raise the server's max_body_bytes",
        code="request_too_large",
        headers={"Connection": "close"},
    )
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise too_long
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_long
    return bytes(body)
