"""The app on a real socket: uvicorn on a free loopback port, in a thread."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import uvicorn

from jaxserve.server.app import create_app
from jaxserve.server.state import Server


class LiveServer:
    """Serves `llm` between `with` and its end.

    Attributes:
        url: where, without a trailing slash.
        state: the app's parts.
    """

    def __init__(self, llm: Any, **options: Any):
        self.llm = llm
        app = create_app(llm, **options)
        self.state: Server = app.state.server
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(
            uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1)
        )
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="live-server"
        )

    def __enter__(self) -> LiveServer:
        self._thread.start()
        wait_until(lambda: self._server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self._socket.close()
        self.llm.shutdown()


def wait_until(condition: Any, timeout: float = 10.0) -> None:
    """Polls; fails the test if it never becomes true."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)
