"""XLA:CPU custom calls in C++: the ops of a decoder layer at the speed of the memory bus.

Weights are used as Hugging Face stores them, [out, in], float32 or bfloat16 (also as uint16 bits),
one layer or stacked `[L, ...]` and indexed by a traced `layer`, so a scan never copies a slice.
`num_rows` says how many rows of a padded batch are real; the others cost nothing and come out 0.
A row's result is the same bits whatever else is in the batch and however many threads run.
All ops are forward only and need `available()` to be true.
"""

import ctypes
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kernels_pallas.cpu import build

__all__ = ["available", "gated_linear", "linear", "rms_norm"]

_TARGETS = ("linear", "gated_linear", "rms_norm")


@functools.cache
def available() -> bool:
    """Whether the kernels can run here; compiles and registers them on the first call."""
    path = build.library()
    if path is None:
        return False
    library = ctypes.CDLL(str(path))
    for target in _TARGETS:
        handler = jax.ffi.pycapsule(getattr(library, f"jaxserve_{target}"))
        jax.ffi.register_ffi_target(f"jaxserve_{target}", handler, platform="cpu")
    return True


def linear(
    x: Array,  # [T, D]
    weights: tuple[Array, ...],  # each [N, D] or [L, N, D]
    *,
    layer: Array | int | None = None,
    num_rows: Array | int | None = None,
) -> tuple[Array, ...]:  # each [T, N] float32
    """x @ w.T for several weights that share x, in one call.

    With bfloat16 weights x is rounded to bfloat16 once; sums are float32.
    """
    outs = tuple(_floats(x.shape[0], w.shape[-2]) for w in weights)
    return tuple(_call("linear", outs)(x, _rows(num_rows, x), _int(layer), *weights))


def gated_linear(
    x: Array,  # [T, D]
    w_gate: Array,  # [F, D] or [L, F, D]
    w_up: Array,  # as w_gate
    *,
    layer: Array | int | None = None,
    num_rows: Array | int | None = None,
    activation: str = "silu",
) -> Array:  # [T, F] float32
    """act(x @ w_gate.T) * (x @ w_up.T); `activation` is "silu" or "gelu_tanh"."""
    _check_activation(activation)
    call = _call("gated_linear", _floats(x.shape[0], w_gate.shape[-2]))
    return call(x, _rows(num_rows, x), _int(layer), w_gate, w_up, activation=activation)


def rms_norm(
    x: Array,  # [T, D]
    scale: Array,  # [D] or [L, D]
    *,
    eps: float,
    layer: Array | int | None = None,
    num_rows: Array | int | None = None,
    offset: float = 0.0,
) -> Array:  # [T, D] float32
    """x / rms(x) * (offset + scale); per head, pass x as [T * N, H]."""
    call = _call("rms_norm", _floats(*x.shape))
    x = x.astype(jnp.float32)
    rows, index = _rows(num_rows, x), _int(layer)
    return call(x, scale, rows, index, eps=np.float32(eps), offset=np.float32(offset))


def _call(target: str, outs, **options):
    if not available():
        raise RuntimeError(f"jaxserve_{target}: native CPU kernels are not available; see the log")
    return jax.ffi.ffi_call(f"jaxserve_{target}", outs, **options)


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _int(value: Array | int | None) -> Array:
    return jnp.asarray(0 if value is None else value, jnp.int32)


def _rows(num_rows: Array | int | None, x: Array) -> Array:
    return _int(x.shape[0] if num_rows is None else num_rows)


def _check_activation(name: str) -> None:
    if name not in ("silu", "gelu_tanh"):
        raise ValueError(f"activation={name!r} must be 'silu' or 'gelu_tanh'")
