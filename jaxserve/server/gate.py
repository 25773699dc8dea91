"""Who may come in: the concurrency limit, the drain and the API key."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxserve.server.errors import ApiError
from jaxserve.server.wire import json_response

OPEN_PATHS = frozenset({"/health", "/version", "/metrics", "/openapi.json"})
"""Served without a key: probes and scrapers carry none."""


class Gate:
    """Counts the requests inside; turns others away when full or draining."""

    def __init__(self, limit: int):
        self.limit = limit
        self.running = 0
        self.draining = False
        self._stops: set[Callable[[], None]] = set()

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Holds one place for the duration of a request, its response included."""
        if self.draining:
            raise ApiError(
                503,
                "the server is shutting down; retry on another one",
                code="draining",
                headers={"Retry-After": "5"},
            )
        if self.running >= self.limit:
            raise ApiError(
                429,
                f"{self.running} requests are running, the limit is {self.limit}; retry later",
                code="too_many_requests",
                headers={"Retry-After": "1"},
            )
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    def hold(self, stop: Callable[[], None]) -> Callable[[], None]:
        """Remembers how to end a request early; returns what to call when it has ended."""
        self._stops.add(stop)
        return lambda: self._stops.discard(stop)

    def cut_off(self) -> None:
        """Ends every request that is still inside."""
        for stop in list(self._stops):
            stop()

    async def drain(self, timeout: float) -> bool:
        """Lets nobody in and waits for those inside; False if some were left after `timeout` s."""
        self.draining = True
        deadline = asyncio.get_running_loop().time() + timeout
        while self.running and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        return not self.running


class KeyCheck:
    """ASGI middleware: 401 without one of the keys, as a bearer token or as `x-api-key`."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]):
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = _key(Headers(scope=scope)).encode()
            if not any(hmac.compare_digest(given, key) for key in self._keys):
                error = _refusal(bool(given))
                answer = json_response(error.body(scope["path"]), 401, error.headers)
                return await answer(scope, receive, send)
        await self._app(scope, receive, send)


def _key(headers: Headers) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def _refusal(given: bool) -> ApiError:
    seen = "the API key is not known to this server" if given else "no API key was sent"
    return ApiError(
        401,
        f"{seen}; send one as `Authorization: Bearer KEY` or `x-api-key: KEY`",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )
