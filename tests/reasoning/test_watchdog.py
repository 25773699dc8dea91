"""Controllers that never return: their own query fails by name, and nothing else notices."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass
from typing import ClassVar

import pytest

from jaxserve.protocol import SearchError
from reasoning.controllers.rebase import Rebase
from reasoning.controllers.self_consistency import SelfConsistency
from reasoning.pool import run_pool
from reasoning.result import Budget
from reasoning.search import run_search
from reasoning.simulated import SimulatedPool, Trees, question
from reasoning.watchdog import limited
from tests.reasoning.fake_pool import QUESTION, FakePool, text


def stuck() -> None:
    while True:
        pass


def stubborn() -> None:
    while True:
        try:
            stuck()
        except Exception:
            continue


@pytest.mark.parametrize("loop", [stuck, stubborn])
def test_a_loop_is_broken_off(loop):
    began = time.monotonic()
    with pytest.raises(SearchError, match=r"who has not decided within 0.1 s.*Budget\(decision"):
        limited(0.1, "who", loop)
    assert time.monotonic() - began < 10


def test_what_returns_in_time_is_left_alone():
    for i in range(2000):
        assert limited(30.0, "quick", lambda x: x + 1, i) == i + 1
    with pytest.raises(KeyError):
        limited(30.0, "wrong", {}.__getitem__, "x")


def test_what_is_late_is_late_once():
    """An interruption never arrives after the call that it was for."""
    for _ in range(30):
        took = 0.05 + 0.002 * (time.monotonic_ns() % 30)
        try:
            limited(0.05, "slow", time.sleep, took)
        except SearchError as error:
            assert "slow" in str(error)
        deadline = time.monotonic() + 0.002
        while time.monotonic() < deadline:
            pass  # would be interrupted here


def test_every_thread_has_its_own_limit():
    found = list[object]()

    def other() -> None:
        found.append(limited(30.0, "other", lambda: sum(range(300_000))))

    thread = threading.Thread(target=other)
    thread.start()
    with pytest.raises(SearchError, match="mine"):
        limited(0.1, "mine", stuck)
    thread.join()
    assert found == [sum(range(300_000))]


@dataclass(frozen=True)
class Stuck(Rebase):
    """Loops for ever once it has seen a step."""

    name: ClassVar[str] = "stuck"

    def observe(self, tree, grown):
        stuck()


def test_a_tree_policy_that_never_returns_fails_by_name():
    pool = SimulatedPool(Trees())
    with pytest.raises(SearchError, match="stuck has not decided within"):
        asyncio.run(run_search(Stuck(4), pool, question(0), Budget(decision=0.2)))
    assert pool.capacity().free_pages == pool.machine.pages
    assert pool.capacity().live_rows == 0
    plain = asyncio.run(run_search(Rebase(4), pool, question(1)))
    assert plain.stopped == "done"


@dataclass(frozen=True)
class Brooding(SelfConsistency):
    name: ClassVar[str] = "brooding"

    def step(self, view):
        stuck()


def test_a_pool_policy_that_never_returns_fails_by_name():
    pool = FakePool([text(4), text(5)])
    with pytest.raises(SearchError, match="brooding has not decided within"):
        asyncio.run(run_pool(Brooding(2), pool, QUESTION, Budget(decision=0.2)))
    assert pool.closed
