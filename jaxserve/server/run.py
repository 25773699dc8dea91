"""uvicorn with a drain: the first SIGTERM finishes what runs, the second one stops at once."""

from __future__ import annotations

import asyncio
import logging
import socket
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from jaxserve.errors import ConfigError
from jaxserve.server.state import Server as ServerState

log = logging.getLogger(__name__)

_LAST_WORDS = 5.0
"""Seconds for those that were cut off to be told so."""


def bind(host: str, port: int) -> socket.socket:
    """Takes the port without listening on it yet; 0 takes a free one.

    Raises:
        ConfigError: it cannot be had.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(
            f"cannot serve on {host} port {port}: {error}; choose another --host or --port"
        ) from None
    return listener


def url_of(listener: socket.socket) -> str:
    """Where clients on this machine reach it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, str(host))
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class DrainingServer(uvicorn.Server):
    """Answers 503 to newcomers while the requests inside finish, then exits with 0."""

    def __init__(self, config: uvicorn.Config, state: ServerState, drain_timeout: float):
        super().__init__(config)
        self._state, self._drain_timeout = state, drain_timeout
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
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
            gate.cut_off()
            await gate.drain(_LAST_WORDS)
        self.should_exit = True


def run(app: Starlette, listener: socket.socket, *, drain_timeout: float = 30.0) -> None:
    """Serves until a signal; uses uvloop and httptools where they are installed."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=1,
        server_header=False,
    )
    DrainingServer(config, app.state.server, drain_timeout).run(sockets=[listener])
