"""Programs compiled before they are asked for, by many threads, while nothing is timed.

A kernel takes seconds to compile and milliseconds to run, and a compiler lets go of the
interpreter. Threads that went on compiling while a clock runs would take the host from it, and
XLA's trials of its own tiles would take the device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

_THREADS = 16

Make = Callable[[], Any]
"""Compiles a program."""


class Ahead:
    """Programs by what they are for."""

    def __init__(self) -> None:
        self._jobs: dict[Hashable, Future[Any]] = {}

    def fill(self, wanted: Mapping[Hashable, Make], done: Callable[[], Any]) -> None:
        """Compiles all of these, and says so after each. Those of before are let go."""
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
            self._jobs = {key: pool.submit(make) for key, make in wanted.items()}
            for _ in as_completed(self._jobs.values()):
                done()

    def take(self, key: Hashable, make: Make) -> Any:
        """What was compiled for this, or what `make` compiles now.

        Raises:
            Exception: whatever kept it from being compiled.
        """
        job = self._jobs.get(key)
        return job.result() if job else make()
