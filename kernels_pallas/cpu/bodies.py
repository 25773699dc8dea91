"""The C++ kernels, given arrays as the models shape them and weights as they are stored.

`num_rows` says how many rows of a padded batch are real; None: all of them.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import Array

from kernels_pallas import cpu
from kernels_pallas.linear import check_residual
from kernels_pallas.linear import linear as linear_reference
from kernels_pallas.op import UnsupportedError
from kernels_pallas.paged_attention.codec import QuantizedPages, check_alike
from kernels_pallas.paged_attention.ragged import Ragged
from kernels_pallas.weight import Int8Weight, StackedWeight, Weight, as_array

_FLOATS = (jnp.float32, jnp.bfloat16)
_NATIVE = (*_FLOATS, jnp.int8)


def linear(
    x: Array, *weights: Weight, residual: Array | None = None, num_rows: Array | None = None
) -> Any:
    """`kernels_pallas.linear.linear`."""
    check_residual(residual, len(weights))
    if x.dtype not in _FLOATS or any(w.dtype not in _NATIVE for w in weights):
        return linear_reference(x, *weights, residual=residual)
    if residual is not None and residual.dtype != jnp.float32:  # products are rounded first
        return residual + linear(x, *weights, num_rows=num_rows)
    layer = layer_of(weights[0])[1]
    flat, scales = _matrices([layer_of(w)[0] for w in weights], layer is not None)
    rows = x.reshape(-1, x.shape[-1])
    shapes = [w.shape[:-1] for w in weights]
    options = {"layer": layer, "num_rows": num_rows, "residual": residual}
    ys = cpu.linear(rows, flat, scales=scales, shapes=shapes, **options)
    outs = tuple(
        y.astype(x.dtype).reshape(*x.shape[:-1], *w.shape[:-1])
        for y, w in zip(ys, weights, strict=True)
    )
    return outs if len(weights) > 1 else outs[0]


def gated_linear(
    x: Array, w_gate: Weight, w_up: Weight, *, activation: str, num_rows: Array | None = None
) -> Array:
    """`kernels_pallas.linear.gated_linear`.

    Raises:
        UnsupportedError: C++ computes with no such types.
    """
    _check_types(_FLOATS, x)
    _check_types(_NATIVE, w_gate, w_up)
    layer = layer_of(w_gate)[1]
    pair, scales = _matrices([layer_of(w)[0] for w in (w_gate, w_up)], layer is not None)
    options = {"layer": layer, "num_rows": num_rows, "activation": activation}
    y = cpu.gated_linear(x.reshape(-1, x.shape[-1]), *pair, scales=scales, **options)
    return y.astype(x.dtype).reshape(*x.shape[:-1], y.shape[-1])


def rms_norm(
    x: Array, scale: Weight, *, eps: float, offset: float = 0.0, num_rows: Array | None = None
) -> Array:
    """`kernels_pallas.rms_norm.rms_norm` of [B, T, ..., D], of which `num_rows` tokens are real.

    Raises:
        UnsupportedError: C++ computes with no such scale.
    """
    _check_types(_FLOATS, scale)
    flat = x.reshape(-1, x.shape[-1])
    if num_rows is not None:
        num_rows = num_rows * math.prod(x.shape[2:-1])  # heads, where heads are normed
    y = cpu.rms_norm(flat, as_array(scale), eps=eps, offset=offset, num_rows=num_rows)
    return y.astype(x.dtype).reshape(x.shape)


def paged_attention(q, k, v, k_pages, v_pages, layer, batch: Ragged, *, sinks=None, **options):
    """`kernels_pallas.paged_attention.paged_attention`.

    Raises:
        UnsupportedError: keys and values are in pages of two kinds, or of a type that C++ does not
            read; rows are shorter than those of pages; a part in four bits is cut by `value_dim`.
    """
    stacks = [k_pages] if v_pages is None else [k_pages, v_pages]
    check_alike(*stacks)
    if not isinstance(k_pages, QuantizedPages):
        _check_types((*_FLOATS, jnp.uint16), *stacks)
    sinks = None if sinks is None else as_array(sinks)
    return cpu.paged_attention(q, k, v, k_pages, v_pages, layer, *batch, sinks=sinks, **options)


def _check_types(taken: tuple[Any, ...], *arrays: Weight) -> None:
    """Refuses arrays of other types than are `taken`: C++ would only say so when it runs.

    Raises:
        UnsupportedError: there are such.
    """
    if any(x.dtype not in taken for x in arrays):
        seen = " and ".join(str(x.dtype) for x in arrays)
        expected = ", ".join(jnp.dtype(t).name for t in taken)
        raise UnsupportedError(f"{seen}: the C++ kernels take {expected}")


def layer_of(w: Weight) -> tuple[Any, Array | int | None]:
    """What is stored, and which layer of it is meant if it is a stack."""
    if isinstance(w, StackedWeight):
        return w.stack, w.index
    return (w if isinstance(w, Int8Weight) else as_array(w)), None


def _matrices(weights: list[Any], stacked: bool) -> tuple[tuple[Array, ...], Any]:
    """Weights [*out, in] as [out, in], stacks of them as [L, out, in]; and scales alike."""
    lead = 1 if stacked else 0

    def flat(w: Array) -> Array:
        return w.reshape(*w.shape[:lead], -1, w.shape[-1])

    values = tuple(flat(w.values if isinstance(w, Int8Weight) else w) for w in weights)
    scales = (w.scale for w in weights if isinstance(w, Int8Weight))
    return values, tuple(s.reshape(*s.shape[:lead], -1) for s in scales)
