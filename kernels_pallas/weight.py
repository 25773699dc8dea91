"""The kinds of weights that products understand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Weight:
    """values * scale, in products with rows of x that are rounded to eight bits too (W8A8).

    Attributes:
        values: int8 [..., *out, K].
        scale: float32 [..., *out].
    """

    values: Any  # arrays, or numpy's before they are placed
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def dtype(self):
        return self.values.dtype

    def dequantized(self) -> Array:
        """The weight as float32."""
        scale = self.scale.reshape(self.scale.shape + (1,) * (self.ndim - self.scale.ndim))
        return self.values.astype(jnp.float32) * scale


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

    stack: Array | Int8Weight
    index: Array | int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack.shape[1:]

    @property
    def dtype(self):
        return self.stack.dtype

    def take(self) -> Any:
        """The layer's own weight."""
        return jax.tree.map(self._layer, self.stack)

    def _layer(self, x: Array) -> Array:
        return lax.dynamic_index_in_dim(x, self.index, keepdims=False)


@partial(
    jax.tree_util.register_dataclass, meta_fields=["scale"], data_fields=["base", "down", "up"]
)
@dataclass(frozen=True)
class LowRankWeight:
    """base + scale * up @ down (LoRA; Hu et al., 2021).

    Attributes:
        base: [*out, K].
        down: [rank, K].
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
        rows = up.reshape(*down.shape[:-2], -1, up.shape[-1])  # of each layer, in a stack
        added = self.scale * (rows @ down).reshape(base.shape)
        return (base.astype(added.dtype) + added).astype(base.dtype)


Weight = Array | Int8Weight | StackedWeight | LowRankWeight


def unstacked(w: Weight) -> Any:
    """One layer's weight, of whatever kind it is."""
    return w.take() if isinstance(w, StackedWeight) else w


def as_array(w: Weight) -> Array:
    """One layer's weight as a plain array."""
    if isinstance(w, LowRankWeight):
        return w.merged()
    layer = unstacked(w)
    return layer.dequantized() if isinstance(layer, Int8Weight) else layer


def expert_of(w: Weight, expert: Array) -> Any:
    """One expert's weight out of [E, ...], read straight from the stack where there is one."""
    if not isinstance(w, StackedWeight):
        return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, expert, keepdims=False), w)

    def take(x: Array) -> Array:
        start = (w.index, expert) + (0,) * (x.ndim - 2)
        return lax.dynamic_slice(x, start, (1, 1, *x.shape[2:]))[0, 0]

    return jax.tree.map(take, w.stack)
