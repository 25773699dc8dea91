"""The kinds of weights that products understand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

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


@partial(
    jax.tree_util.register_dataclass, meta_fields=["scale"], data_fields=["base", "down", "up"]
)
@dataclass(frozen=True)
class LowRankWeight:
    """base + scale * up @ down (LoRA; Hu et al., 2021).

    Attributes:
        base: [*out, *in].
        down: [rank, *in].
        up: [*out, rank].
    """

    base: Any
    down: Any
    up: Any
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self):
        return self.base.dtype

    def merged(self) -> Array:
        """The sum, as one array; also of whole stacks."""
        base, down, up = (as_array(w) for w in (self.base, self.down, self.up))
        lead = down.ndim - (base.ndim - (up.ndim - 1)) - 1  # stacked axes: 1 or 0
        rows = up.reshape(*up.shape[:lead], -1, up.shape[-1])
        cols = down.reshape(*down.shape[: lead + 1], -1)
        added = self.scale * (rows @ cols).reshape(base.shape)
        return (base.astype(added.dtype) + added).astype(base.dtype)


Weight = Array | StackedWeight | LowRankWeight


def as_array(w: Weight) -> Array:
    if isinstance(w, LowRankWeight):
        return w.merged()
    return w.take() if isinstance(w, StackedWeight) else w


def expert_of(w: Weight, expert: Array) -> Array:
    """One expert's matrix out of [E, ...], read straight from the stack where there is one."""
    if not isinstance(w, StackedWeight):
        return lax.dynamic_index_in_dim(w, expert, keepdims=False)
    start = (w.index, expert) + (0,) * (w.stack.ndim - 2)
    return lax.dynamic_slice(w.stack, start, (1, 1, *w.stack.shape[2:]))[0, 0]
