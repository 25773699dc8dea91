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
from jaxserve.engine.lockstep import Event, Lockstep, as_event
from jaxserve.engine.sequence import Sequence
from jaxserve.errors import EngineError

log = logging.getLogger(__name__)


class EngineLoop:
    """Runs an engine in a daemon thread until `close`.

    Args:
        lockstep: tells engines of other processes what happens to this one.
    """

    def __init__(self, engine: Engine, lockstep: Lockstep | None = None):
        self._engine, self._lockstep = engine, lockstep
        self._inbox: deque[tuple[Event | None, Callable[[], None]]] = deque()
        self._shut = EngineError("the engine has been shut down")
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="jaxserve-engine", daemon=True)
        self._over = threading.Event()
        if lockstep is not None:
            engine.explain = lockstep.explained
            threading.Thread(target=self._watch, args=[lockstep], daemon=True).start()
        self._thread.start()

    def submit(self, sequences: list[Sequence]) -> None:
        """Queues a request.

        Raises:
            EngineError: the engine has been shut down.
        """
        event = as_event(sequences) if self._lockstep else None
        self._post(lambda: self._engine.add(sequences), event)

    def abort(self, request_id: str) -> None:
        """Ends a request at the next step; does nothing after shut-down."""
        if not self._closed:
            self._post(lambda: self._engine.abort(request_id), ["abort", request_id])

    def post(self, function: Callable[[Engine], object]) -> None:
        """Has a function run on the engine's thread, between steps; it must not raise.

        Raises:
            EngineError: the engine has been shut down.
        """

        def run() -> None:
            function(self._engine)

        self._post(run)

    def call(self, function: Callable[[Engine], Any]) -> Any:
        """Runs a function on the engine's thread, between steps, and returns its result.

        It must leave the engine as it is: other processes do not hear of it.
        """
        return self._wait_for(function, None)

    def order(self, name: str, *arguments: Any) -> Any:
        """`call` of a method of the engine, in all processes; JSON can say its arguments."""
        return self._wait_for(lambda engine: getattr(engine, name)(*arguments), [name, *arguments])

    def _wait_for(self, function: Callable[[Engine], Any], event: Event | None) -> Any:
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(function(self._engine))
            except BaseException as error:
                future.set_exception(error)

        self._post(run, event)
        return future.result()

    def stats(self) -> EngineStats:
        """A snapshot, taken without stopping the engine; counters may be a step apart.

        Raises:
            EngineError: the engine has been shut down.
        """
        if self._closed:
            raise self._shut
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

    def _post(self, message: Callable[[], None], event: Event | None = None) -> None:
        with self._wake:
            if self._closed:
                raise self._shut
            self._inbox.append((event, message))
            self._wake.notify()

    def _run(self) -> None:
        engine = self._engine
        while not self._closed:
            with self._wake:
                while not (self._inbox or engine.has_work or self._closed):
                    self._wake.wait()
            try:
                self._round()
            except Exception as error:
                if self._lockstep is not None:  # processes are no longer at the same place
                    return self._finish(self._lockstep.explained(error))
                log.exception("the engine goes on without the requests of the failed step")
        if self._lockstep is not None:
            self._lockstep.end()
        self._finish(EngineError("the engine has been shut down"))
        engine.runner.close()

    def _round(self) -> None:
        """What has come in, and a step."""
        arrived = [self._inbox.popleft() for _ in range(len(self._inbox))]
        events = [event for event, _ in arrived if event is not None]
        if self._lockstep is not None and (events or self._engine.has_work):
            self._lockstep.tell(events)
        for _, run in arrived:
            run()
        if self._engine.has_work:
            self._engine.step()

    def _finish(self, error: EngineError) -> None:
        """Ends everything that waits, for good."""
        with self._wake:
            self._shut, self._closed = error, True
        self._over.set()
        self._engine.close(error)
        while self._inbox:  # calls that lost the race must not wait for ever
            self._inbox.popleft()[1]()
        self._engine.close(error)

    def _watch(self, lockstep: Lockstep) -> None:
        """Ends what waits for processes that are gone, where the engine's thread does not."""
        if (error := lockstep.watch(self._over)) is not None:
            self._finish(error)
