"""Times contestants in turns, so that whatever disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_BATCH = 0.02  # seconds of calls that are waited for together, which hides the waiting itself
_MOST = 256  # launches of a batch: their results may exist all at once


@dataclass(frozen=True)
class Launch:
    """Work that is started without waiting.

    Attributes:
        start: starts it and returns what to wait for.
        wait: returns when that has been computed, and everything started before it.
        calls: of the op in one start.
    """

    start: Callable[[], Any]
    wait: Callable[[Any], Any]
    calls: int = 1


@dataclass(frozen=True)
class Times:
    """Seconds of a call, one sample for each batch.

    Attributes:
        hosts: of them, until the last call had been started. Where that is nearly all, the host
            could not start calls faster, and the samples say little about the device.
    """

    samples: Sequence[float]
    hosts: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def host(self) -> float:
        return statistics.median(self.hosts)

    @property
    def best(self) -> float:
        return min(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high


def race(
    contestants: Mapping[str, Launch], seconds: float, *, least: int = 3, batch: float = _BATCH
) -> dict[str, Times]:
    """Samples of each: after two calls to warm up, in turns, for about `seconds` each."""
    launches = {name: _batch(launch, batch) for name, launch in contestants.items()}
    samples = {name: list[tuple[float, float]]() for name in contestants}
    deadline = time.perf_counter() + seconds * len(contestants)
    while min(map(len, samples.values()), default=least) < least or time.perf_counter() < deadline:
        for name, launch in contestants.items():
            samples[name].append(_timed(launch, launches[name]))
    return {name: Times(*zip(*found, strict=True)) for name, found in samples.items()}


def _batch(launch: Launch, seconds: float) -> int:
    """Launches that take about `seconds`, found out after one that warms up."""
    _timed(launch, 1)
    once = _timed(launch, 1)[0] * launch.calls
    return int(min(_MOST, max(1, seconds / max(once, 1e-7))))


def _timed(launch: Launch, launches: int) -> tuple[float, float]:
    """Seconds of a call until all have ended, and until all have been started."""
    began, started = time.perf_counter(), None
    for _ in range(launches):
        started = launch.start()
    host = time.perf_counter()
    launch.wait(started)
    calls = launches * launch.calls
    return (time.perf_counter() - began) / calls, (host - began) / calls


def fastest(times: Mapping[str, Times], among: Sequence[str]) -> str | None:
    """The name with the smallest median."""
    timed = [name for name in among if name in times]
    return min(timed, key=lambda name: times[name].median) if timed else None
