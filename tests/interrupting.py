"""Ctrl-C, as in a notebook."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def interrupted(begun: Callable[[], object]) -> Iterator[None]:
    """Expects KeyboardInterrupt of its body, in which ctrl-C is pressed once it has `begun`.

    Pressed again each second, as a user would. Python drops one that comes while it collects
    garbage, as JAX has a callback there, in which nothing can be raised: none is collected here.
    Where tests run in a shell's background, Python was told to ignore it, and is told otherwise.
    """
    main = threading.main_thread().ident
    assert main is not None
    heard = threading.Event()

    def press() -> None:
        wait = 0.01
        while not heard.wait(wait):
            if begun():
                signal.pthread_kill(main, signal.SIGINT)
                wait = 1.0

    hand = threading.Thread(target=press)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.disable()
    hand.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            try:
                yield
            finally:
                heard.set()
    finally:
        hand.join()
        gc.enable()
        signal.signal(signal.SIGINT, before)
