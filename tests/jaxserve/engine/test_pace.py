"""What a row costs, from the times of steps."""

from __future__ import annotations

import math
from random import Random

import pytest

from jaxserve.engine.pace import Pace


def seen(base: float, each: float, count: int = 200, late: float = 0.0) -> Pace:
    """Steps of 1 to 32 rows, some of which are held up tenfold."""
    pace, rng = Pace(), Random(1)
    for _ in range(count):
        rows = rng.randint(1, 32)
        slow = 10.0 if rng.random() < late else 1.0
        pace.see(rows, (base + each * rows) * slow)
    return pace


def test_a_line_is_found():
    pace = seen(1e-3, 5e-5)
    assert pace.doubles == pytest.approx(20, rel=1e-6)
    assert pace.seconds(8) == pytest.approx(1.4e-3)


def test_steps_that_are_held_up_change_little():
    pace = seen(1e-3, 5e-5, 400, late=0.05)
    assert pace.doubles == pytest.approx(20, rel=0.35)


def test_nothing_is_said_before_sizes_differ():
    pace = Pace()
    for _ in range(100):
        pace.see(4, 1e-3)
    assert pace.doubles is None
    assert pace.seconds(4) == pytest.approx(1e-3)


def test_rows_that_cost_nothing():
    assert seen(1e-3, 0.0).doubles == math.inf or seen(1e-3, 0.0).doubles > 1e6


def test_what_was_learned_stays_while_sizes_do_not_change_and_then_changes():
    pace = seen(1e-3, 5e-5)
    for _ in range(3000):
        pace.see(16, 1.8e-3)
    assert pace.doubles == pytest.approx(20, rel=0.1)
    rng = Random(2)
    for _ in range(3000):
        rows = rng.randint(1, 32)
        pace.see(rows, 1e-3 + 1.25e-4 * rows)
    assert pace.doubles == pytest.approx(8, rel=0.1)


def test_steps_of_nearly_one_size_leave_what_a_row_costs_alone():
    pace, rng = seen(1e-3, 5e-5), Random(3)
    for _ in range(3000):
        pace.see(rng.choice([15, 16, 16, 16]), 1.8e-3 * rng.choice([0.9, 1.0, 1.0, 1.2]))
    assert pace.doubles == pytest.approx(20, rel=0.25)


def test_some_of_a_step_is_fixed_whatever_times_say():
    pace, rng = Pace(), Random(4)
    for _ in range(400):
        rows = rng.randint(1, 31)
        pace.see(rows, 1e-4 * rows)
    assert pace.doubles == pytest.approx(16 / 3, rel=0.2)
