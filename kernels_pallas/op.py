"""What all ops share: weights that stay in their stack."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jax import Array, lax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StackedWeight:
    """One layer's weight, still inside the stack of all layers.

    A scan over layers that slices its weights copies each of them before use wherever the compiler
    does not fuse the slice into the product (on CPU it never does). So serving hands kernels the
    whole stack and the index.

    Attributes:
        stack: [L, ...].
        index: which layer; int32 scalar.
    """

    stack: Array
    index: Array | int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack.shape[1:]

    @property
    def dtype(self):
        return self.stack.dtype

    def take(self) -> Array:
        """The layer's own array."""
        return lax.dynamic_index_in_dim(self.stack, self.index, keepdims=False)


Weight = Array | StackedWeight


def as_array(w: Weight) -> Array:
    return w.take() if isinstance(w, StackedWeight) else w


def expert_of(w: Weight, expert: Array) -> Array:
    """One expert's matrix out of [E, ...], read straight from the stack where there is one."""
    if not isinstance(w, StackedWeight):
        return lax.dynamic_index_in_dim(w, expert, keepdims=False)
    start = (w.index, expert) + (0,) * (w.stack.ndim - 2)
    return lax.dynamic_slice(w.stack, start, (1, 1, *w.stack.shape[2:]))[0, 0]
