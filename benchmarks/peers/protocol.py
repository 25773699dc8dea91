"""A driver's side of a comparison: JSON lines in, JSON lines out, one request at a time.

Standard library only, for it runs in every peer's own environment. A driver is one function,
`load(settings) -> Loaded`; `serve` does the rest.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import IO, Any

Generate = Callable[[list[list[int]], list[int]], list[list[int]]]
"""Prompts and exact output lengths to output ids: greedy, ignoring the end-of-text token."""


@dataclass(frozen=True)
class Loaded:
    """A contestant ready for its first request.

    Attributes:
        settle: waits for whatever is still being prepared behind the first answers.
    """

    generate: Generate
    settle: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Settings:
    """How a contestant is set up; the same for all of them."""

    model: str
    dtype: str
    threads: int
    max_len: int


def serve(load: Callable[[Settings], Loaded], packages: Sequence[str]) -> None:
    """Answers `load`, then any number of `run` and `settle`, until the input ends."""
    answers, state = _claim_stdout(), {}
    for line in sys.stdin:
        try:
            answer = _answer(json.loads(line), load, packages, state)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _answer(
    request: dict[str, Any],
    load: Callable[[Settings], Loaded],
    packages: Sequence[str],
    state: dict[str, Loaded],
) -> dict[str, Any]:
    if request["op"] == "load":
        state["loaded"] = load(Settings(**request["settings"]))
        return {"versions": {package: version(package) for package in packages}}
    wall, cpu = time.perf_counter(), time.process_time()
    if request["op"] == "settle":
        state["loaded"].settle()
        return {"wall_s": time.perf_counter() - wall}
    outputs = state["loaded"].generate(request["prompts"], request["lengths"])
    seconds = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**seconds, "peak_rss_mib": peak, "outputs": outputs}


def _claim_stdout() -> IO[str]:
    """The answers' stream; whatever a library prints goes to stderr instead."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers
