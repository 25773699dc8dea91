"""Kernels in the simulator of a GPU, which looks for races."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from tests.kernels_pallas import simulators


def on_hopper(run: Callable[..., Any]) -> Any:
    """What run(interpret=...) comes to, once all of it has happened without a race."""
    try:
        found = jax.block_until_ready(run(interpret=simulators.gpu()))
        assert not simulators.gpu_races_found()
    finally:
        simulators.reset_gpu()
    return found
