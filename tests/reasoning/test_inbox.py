"""Events by the handful."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from jaxserve.protocol import Event, Node, Scored, SearchError
from reasoning.inbox import Inbox


def event(i: int) -> Event:
    return Scored(Node(0), "prm", i / 8)


async def handfuls(*sizes: int) -> AsyncIterator[Event]:
    for size in sizes:
        for i in range(size):
            yield event(i)
        await asyncio.sleep(0.01)


def test_what_comes_together_is_told_together():
    async def read() -> list[int]:
        inbox = Inbox(handfuls(3, 1, 2))
        found = [len(await inbox.wait()) for _ in range(3)]
        with pytest.raises(SearchError, match="closed the query"):
            await inbox.wait()
        await inbox.close()
        return found

    assert asyncio.run(read()) == [3, 1, 2]


def test_time_is_up_though_nothing_came():
    async def read() -> list[Event]:
        inbox = Inbox(never(), 0.02)
        found = await inbox.wait()
        await inbox.close()
        return found

    assert asyncio.run(asyncio.wait_for(read(), 5)) == []


async def never() -> AsyncIterator[Event]:
    await asyncio.Event().wait()
    yield event(0)


def test_what_the_pool_raises_is_raised_here():
    async def broken() -> AsyncIterator[Event]:
        yield event(0)
        raise SearchError("nothing is on its way")

    async def read() -> None:
        inbox = Inbox(broken())
        try:
            assert len(await inbox.wait()) == 1
            await inbox.wait()
        finally:
            await inbox.close()

    with pytest.raises(SearchError, match="on its way"):
        asyncio.run(read())
