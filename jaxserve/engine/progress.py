"""Start-up as the user sees it: the plan, and one line that counts programs."""

from __future__ import annotations

import logging
import sys
import time

from jaxserve.engine.compile_watch import watch
from jaxserve.plan import Plan

log = logging.getLogger(__name__)


class Progress:
    """Tells the log, and the terminal if `shown`."""

    def __init__(self, plan: Plan, shown: bool, started: float):
        self._plan, self._shown, self._started = plan, shown, started
        self._done, self._compiled_before = 0, watch.compiled - watch.loaded

    def say(self, text: str, end: str = "\n") -> None:
        log.info("%s", text)
        if self._shown:
            print(f"jaxserve: {text}", file=sys.stderr, end=end, flush=True)

    def program(self, kind: str, size: int, seconds: float) -> None:
        """Notes that a program exists."""
        name = f"{kind} {size}".removesuffix(" 0")
        self._done += 1
        log.info("program %s ready after %.2f s", name, seconds)
        if self._done == self._plan.num_programs:
            fresh = watch.compiled - watch.loaded - self._compiled_before
            elapsed = time.monotonic() - self._started
            self.say(
                f"{self._done} programs ready {elapsed:.1f} s after start, "
                f"{max(fresh, 0)} of them compiled, the rest from the cache"
            )
        elif self._shown and sys.stderr.isatty():
            self.say(f"{self._done}/{self._plan.num_programs} programs ({name})", end="\r")
