"""Server-sent events, and the race between a response and a client that hangs up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"
"""What ends an OpenAI stream."""

Frames = AsyncGenerator[bytes, None]

_encoder = msgspec.json.Encoder()


def frame(data: Any, event: str | None = None) -> bytes:
    """One server-sent event; JSON never contains a raw newline, so one data line is enough."""
    head = b"" if event is None else b"event: " + event.encode() + b"\n"
    return head + b"data: " + _encoder.encode(data) + b"\n\n"


class EventStream(Response):
    """Sends frames as they come. An error in mid-stream is sent as `on_error(error)`.

    Args:
        frames: the frames; closed when the client is gone.
        on_error: the last frame after an exception: the status line is long gone.
    """

    media_type = "text/event-stream"

    def __init__(self, frames: Frames, on_error: Callable[[Exception], bytes]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._frames, self._on_error = frames, on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._frames) as frames:
            try:
                async for data in frames:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            except Exception as error:
                last = self._on_error(error)
                await send({"type": "http.response.body", "body": last, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Disconnected(Exception):
    """The client hung up before it had its answer."""


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Runs `work`; a disconnect cancels it at once and raises `Disconnected`.

    The request body must have been read: what `receive` still has to say is the hang-up.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hang_up(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Disconnected
        task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
