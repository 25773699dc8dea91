"""uvicorn with a drain: the first SIGTERM finishes what runs, the second one stops at once."""

from __future__ import annotations

import asyncio
import logging
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from jaxserve.server.state import Server as ServerState

log = logging.getLogger(__name__)


class DrainingServer(uvicorn.Server):
    """Answers 503 to newcomers while the requests inside finish, then exits with 0."""

    def __init__(self, config: uvicorn.Config, state: ServerState, drain_timeout: float):
        super().__init__(config)
        self._state, self._drain_timeout = state, drain_timeout
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None

    async def startup(self, sockets=None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets=sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Runs in the signal handler, so it only leaves a note for the loop."""
        if self._loop is None or self._state.gate.draining:
            self.should_exit = self.force_exit = True
            return
        self._state.gate.draining = True
        self._loop.call_soon_threadsafe(self._start_drain)

    def _start_drain(self) -> None:
        self._drain = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        gate = self._state.gate
        log.info("draining: %d requests are running", gate.running)
        if not await gate.drain(self._drain_timeout):
            log.warning("%d requests are cut off after %gs", gate.running, self._drain_timeout)
        self.should_exit = True


def run(app: Starlette, host: str, port: int, *, drain_timeout: float = 30.0) -> None:
    """Serves until a signal; uses uvloop and httptools where they are installed."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=1,
        server_header=False,
    )
    DrainingServer(config, app.state.server, drain_timeout).run()
