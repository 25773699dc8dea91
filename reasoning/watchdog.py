"""A controller that never returns: its decision is broken off, so that its query fails by name.

A thread cannot be stopped from outside, but an exception can be raised in it (`limited`). That ends
loops of Python. A call into C that does not return, and code that catches `BaseException` and goes
on, cannot be ended: they hold up their own call of `search` for ever, and nobody else.
"""

from __future__ import annotations

import ctypes
import math
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from jaxserve.protocol import SearchError

T = TypeVar("T")

_LOOK = 0.05  # seconds between two looks
_AGAIN = 1.0  # and until whoever went on all the same is interrupted again

_lock = threading.Lock()
_due: dict[int, float] = {}  # by thread: when its decision must be over
_watcher: threading.Thread | None = None


class Overdue(BaseException):
    """Raised in the middle of a decision. No `Exception`: controllers may catch those."""


def limited(seconds: float, who: str, ask: Callable[..., T], *with_: object) -> T:
    """`ask(*with_)`, broken off if it takes longer.

    Raises:
        SearchError: it took longer.
    """
    me = threading.get_ident()
    if seconds == math.inf or me in _due:
        return ask(*with_)
    _watch()
    _due[me] = time.monotonic() + seconds
    try:
        try:
            return ask(*with_)
        finally:
            _forget(me)
    except Overdue:
        while True:
            try:
                _forget(me)  # the interruption may have come before this was through
                break
            except Overdue:
                continue
    raise SearchError(
        f"{who} has not decided within {seconds:g} s, and was broken off; a controller must return "
        "from every call. If it only needs longer, give it a Budget(decision=...)"
    )


def _forget(thread: int) -> None:
    """From here on nobody interrupts the thread. What was on its way arrives in here: between the
    bytecodes of `pop`, at the latest."""
    with _lock:
        _due.pop(thread, None)


def _watch() -> None:
    global _watcher
    if _watcher is None or not _watcher.is_alive():
        with _lock:
            _watcher = threading.Thread(target=_look, name="jaxserve-watchdog", daemon=True)
            _watcher.start()


def _look() -> None:
    while True:
        time.sleep(_LOOK)
        now = time.monotonic()
        with _lock:
            for thread, due in list(_due.items()):
                if now > due:
                    _due[thread] = now + _AGAIN
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(thread), ctypes.py_object(Overdue)
                    )
