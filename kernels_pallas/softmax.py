"""What the softmaxes of kernels have in common. Those are of base 2, which hardware computes."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array

LOG2E = math.log2(math.e)
"""Takes a logit to base 2: exp(x) = exp2(x * LOG2E)."""

MASK_VALUE = -1e30
"""The logit of a hidden key, and the maximum before any. It is finite, so that a row that has seen
no key does not become NaN."""


def begin(sink: Array | None, unit: float) -> tuple[Array | float, Array | float]:
    """The maximum and the sum of a row that has seen its head's sink, a scalar, and no key yet.

    Args:
        sink: a logit; None, or -inf, is no sink.
        unit: takes a logit to the units of the maximum.
    """
    if sink is None:
        return MASK_VALUE, 0.0
    some = sink > MASK_VALUE
    return jnp.where(some, sink * unit, MASK_VALUE), jnp.where(some, 1.0, 0.0)
