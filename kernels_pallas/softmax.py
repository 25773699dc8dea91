"""What the softmaxes of kernels have in common. Those are of base 2, which hardware computes."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array

LOG2E = math.log2(math.e)
"""Takes a logit to base 2: exp(x) = exp2(x * LOG2E)."""

MASK_VALUE = -1e30
"""The logit of a hidden key. It is finite, so that a row that sees no key does not become NaN."""

INITIAL_MAX = -1e30
"""The maximum before any logit. It is finite, so that hidden logits, which are -inf, weigh 0 and
not NaN where nothing else has been seen."""


def begin(sink: Array | None, unit: float) -> tuple[Array | float, Array | float]:
    """The maximum and the sum of a row that has seen its head's sink, a scalar, and no key yet.

    Args:
        sink: a logit; None, or -inf, is no sink.
        unit: takes a logit to the units of the maximum.
    """
    if sink is None:
        return INITIAL_MAX, 0.0
    some = sink > INITIAL_MAX
    return jnp.where(some, sink * unit, INITIAL_MAX), jnp.where(some, 1.0, 0.0)
