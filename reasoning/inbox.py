"""Events of a search, by the handful: those that come together are one occasion to think."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator
from typing import cast

from jaxserve.protocol import Event, SearchError


class Inbox:
    """Reads a query's events as they come, on a task of its own.

    Args:
        seconds: after so many, `wait` returns though nothing has come.
    """

    def __init__(self, events: AsyncIterator[Event], seconds: float = math.inf):
        self._events, self._arrived = events, list[Event]()
        self._wake = asyncio.Event()
        self._reading = asyncio.ensure_future(self._read())
        self._late = False
        self._timer = None
        if seconds < math.inf:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._time_is_up)

    async def _read(self) -> None:
        try:
            async for event in self._events:
                self._arrived.append(event)
                self._wake.set()
        finally:
            self._wake.set()

    def _time_is_up(self) -> None:
        self._late = True
        self._wake.set()

    async def wait(self) -> list[Event]:
        """All that has arrived, and at least one event unless time is up.

        Raises:
            SearchError: the pool closed the query, or found that nothing can come any more.
        """
        while not self._arrived and not self._late:
            if self._reading.done():
                self._reading.result()
                raise SearchError("the pool closed the query while it was searched")
            self._wake.clear()
            await self._wake.wait()
        return self.take()

    def take(self) -> list[Event]:
        """What is there by now."""
        arrived, self._arrived = self._arrived, []
        return arrived

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        events: object = self._events
        if isinstance(events, AsyncGenerator):
            await cast("AsyncGenerator[Event, None]", events).aclose()
