"""Experts of a running engine, moved to where they are asked for.

Counting and moving are programs between two steps; deciding who goes where takes half a second for
a model of 58 layers with 256 experts, and is done beside the engine's thread.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import numpy as np

from jaxserve.engine.engine import Engine
from jaxserve.engine.lockstep import Follower
from jaxserve.engine.loop import EngineLoop
from jaxserve.errors import EngineError
from moe.placement import ExpertLayout

log = logging.getLogger(__name__)


class ExpertBalance:
    """Reads the load of an engine's experts and places them by it; thread-safe.

    Args:
        ready: returns when the programs for it exist, so that the engine's thread need not wait.
        layers: those that have experts, in order.
        interval: steps after which that is done, again and again, in a thread of its own.
    """

    def __init__(
        self,
        loop: EngineLoop | Follower,
        ready: Callable[[], None],
        layout: ExpertLayout,
        layers: list[int],
        interval: int | None,
    ):
        self._loop, self._ready = loop, ready
        self._layout, self._layers = layout, layers
        self._one_at_a_time = threading.Lock()
        self._due, self._closed = threading.Event(), False
        if interval is not None:
            self._interval = interval
            self._thread = threading.Thread(target=self._run, name="jaxserve-experts", daemon=True)
            loop.call(self._attach)
            self._thread.start()

    def _attach(self, engine: Engine) -> None:
        engine.after_step = self._after_step

    def load(self) -> np.ndarray:
        """Tokens that chose each expert since experts were last placed, int64 [L, E].

        Layers without experts have zeros.
        """
        self._ready()
        return self._loop.order("expert_load").result()

    def rebalance(self) -> int:
        """Places experts by their load; the number of slots that took another one.

        Layers whose fullest device would gain nothing stay as they are.
        """
        with self._one_at_a_time:
            load = self.load()[self._layers]
            old = self._loop.call(lambda engine: engine.runner.expert_of)
            new = self._layout.rebalance(load, self._layout.placement(old)).expert_of
            moved = int((old != new).sum())
            if moved:
                self._loop.order("place_experts", new.tolist())
            return moved

    def close(self) -> None:
        """Ends the thread; call it when the loop is closed."""
        self._closed = True
        self._due.set()

    def _after_step(self, num_steps: int) -> None:
        if num_steps % self._interval == 0:
            self._due.set()

    def _run(self) -> None:
        while self._due.wait() and not self._closed:
            self._due.clear()
            try:
                log.info("experts moved into %d slots", self.rebalance())
            except EngineError as error:  # the engine failed a step, or is being shut down
                log.info("experts stay where they are: %s", error)
