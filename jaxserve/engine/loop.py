"""The engine's thread: everything that touches an engine goes through its inbox.

Callers in scripts, notebooks and servers only ever wait on a `Generation`, so interrupting them
leaves the engine usable: the request is aborted at the next step, and that is all.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from jaxserve.engine.engine import Engine, EngineStats
from jaxserve.engine.sequence import Sequence
from jaxserve.errors import EngineError

log = logging.getLogger(__name__)


class EngineLoop:
    """Runs an engine in a daemon thread until `close`."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="jaxserve-engine", daemon=True)
        self._thread.start()

    def submit(self, sequences: list[Sequence]) -> None:
        """Queues a request.

        Raises:
            EngineError: the engine has been shut down.
        """
        self._post(lambda: self._engine.add(sequences))

    def abort(self, request_id: str) -> None:
        """Ends a request at the next step; does nothing after shut-down."""
        if not self._closed:
            self._post(lambda: self._engine.abort(request_id))

    def call(self, function: Callable[[Engine], Any]) -> Any:
        """Runs a function on the engine's thread, between steps, and returns its result."""
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(function(self._engine))
            except BaseException as error:
                future.set_exception(error)

        self._post(run)
        return future.result()

    def stats(self) -> EngineStats:
        """A snapshot, taken without stopping the engine; counters may be a step apart.

        Raises:
            EngineError: the engine has been shut down.
        """
        if self._closed:
            raise EngineError("the engine has been shut down")
        return self._engine.stats()

    def close(self) -> None:
        """Fails what is running, ends the thread and frees the device. Safe to call twice."""
        with self._wake:
            if self._closed:
                return
            self._closed = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _post(self, message: Callable[[], None]) -> None:
        with self._wake:
            if self._closed:
                raise EngineError("the engine has been shut down")
            self._inbox.append(message)
            self._wake.notify()

    def _run(self) -> None:
        engine = self._engine
        while not self._closed:
            with self._wake:
                while not (self._inbox or engine.has_work or self._closed):
                    self._wake.wait()
            while self._inbox:
                self._inbox.popleft()()
            if engine.has_work:
                try:
                    engine.step()
                except Exception:
                    log.exception("the engine goes on without the requests of the failed step")
        engine.close(EngineError("the engine has been shut down"))
        while self._inbox:  # calls that lost the race must not wait for ever
            self._inbox.popleft()()
        engine.close(EngineError("the engine has been shut down"))
        engine.runner.close()
