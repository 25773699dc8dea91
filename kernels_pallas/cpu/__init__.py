"""XLA:CPU custom calls in C++: the ops of a decoder layer at the speed of the memory bus.

Weights are used as Hugging Face stores them, [out, in], float32 or bfloat16 (also as uint16 bits),
one layer or stacked `[L, ...]` and indexed by a traced `layer`, so a scan never copies a slice.
Weights of int8 come with `scales`, one for each output; rows of x are then rounded on their way in
(kernels_pallas.quantize), sums are exact integers, and the result is the reference's to the bit.
`num_rows` says how many rows of a padded batch are real; the others cost nothing and come out 0.
A row's result is the same bits whatever else is in the batch and however many threads run.
All ops are forward only; `op.with_reference_gradient` supplies the backward pass. They need
`available()`.
"""

import ctypes
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kernels_pallas.cpu import build
from kernels_pallas.op import UnsupportedError
from kernels_pallas.paged_attention.codec import (
    Int4Pages,
    Int8Pages,
    Pages,
    QuantizedPages,
    whole_parts,
)
from kernels_pallas.paged_attention.ragged import Groups

__all__ = [
    "argmax",
    "available",
    "expected",
    "experts",
    "gated_linear",
    "has_tiles",
    "linear",
    "paged_attention",
    "ready",
    "rms_norm",
    "rope",
]

_TARGETS = (
    "add_linear",
    "argmax",
    "coded_attention",
    "coded_latent_attention",
    "experts",
    "gated_linear",
    "latent_attention",
    "linear",
    "paged_attention",
    "rms_norm",
    "rope",
)


@functools.cache
def expected() -> bool:
    """Whether the kernels can be had here, as far as can be said without compiling them."""
    return build.find() is not None


def ready() -> bool:
    """Whether `available()` would answer at once."""
    found = build.find()
    return found is None or found[1]


@functools.cache
def available() -> bool:
    """Whether the kernels can run here; compiles and registers them on the first call."""
    path = build.library()
    if path is None:
        return False
    try:
        library = ctypes.CDLL(str(path))
        handlers = {f"jaxserve_{x}": getattr(library, f"jaxserve_{x}") for x in _TARGETS}
    except (OSError, AttributeError) as error:
        build.refuse(path, error)
        return False
    for target, handler in handlers.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform="cpu")
    return True


def has_tiles() -> bool:
    """Whether products in bfloat16 and eight bits go by the tiles of Intel's AMX.

    Floats then add up in an order of theirs: results are close to those of other CPUs, not equal.
    """
    return available() and bool(ctypes.CDLL(str(build.library())).jaxserve_have_tiles())


def linear(
    x: Array,  # [T, D]
    weights: tuple[Array, ...],  # each [N, D] or [L, N, D]
    *,
    scales: tuple[Array, ...] = (),  # of int8 weights: each [N] or [L, N] float32
    layer: Array | int | None = None,
    num_rows: Array | int | None = None,
    shapes: Sequence[tuple[int, ...]] | None = None,  # of N, for each weight
    residual: Array | None = None,  # [..., N] float32, T rows
) -> tuple[Array, ...]:  # each [T, N] float32, or [T, *shape]
    """x @ w.T for several weights that share x, in one call.

    With bfloat16 weights x is rounded to bfloat16 once; sums are float32. A `residual`, which goes
    with one weight, is added to in place where nobody else needs it, and the result has its shape.

    Raises:
        ValueError: a residual of another size than the product.
    """
    shapes = shapes or [w.shape[-2:-1] for w in weights]
    outs = tuple(_floats(x.shape[0], *shape) for shape in shapes)
    rows, index = _rows(num_rows, x), _int(layer)
    if residual is not None:
        if residual.size != outs[0].size:
            raise ValueError(f"a residual {residual.shape} does not fit a product {outs[0].shape}")
        call = _call("add_linear", _floats(*residual.shape), input_output_aliases={3: 0})
        return (call(x, rows, index, residual, *weights, *scales),)
    return tuple(_call("linear", outs)(x, rows, index, *weights, *scales))


def gated_linear(
    x: Array,  # [T, D]
    w_gate: Array,  # [F, D] or [L, F, D]
    w_up: Array,  # as w_gate
    *,
    scales: tuple[Array, ...] = (),  # of int8 weights: each [F] or [L, F] float32
    layer: Array | int | None = None,
    num_rows: Array | int | None = None,
    activation: str = "silu",
) -> Array:  # [T, F] float32
    """act(x @ w_gate.T) * (x @ w_up.T); `activation` is "silu" or "gelu_tanh"."""
    _check_activation(activation)
    call = _call("gated_linear", _floats(x.shape[0], w_gate.shape[-2]))
    rows, index = _rows(num_rows, x), _int(layer)
    return call(x, rows, index, w_gate, w_up, *scales, activation=activation)


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


def argmax(
    x: Array,  # [R, V]
    *,
    num_rows: Array | int | None = None,
) -> tuple[Array, Array]:  # [R] int32, [R] float32
    """Where each row's largest entry first occurs, and the entry; NaN if there is one."""
    R = x.shape[0]
    outs = (jax.ShapeDtypeStruct((R,), jnp.int32), _floats(R))
    ids, tops = _call("argmax", outs)(x.astype(jnp.float32), _rows(num_rows, x))
    return ids, tops


def rope(
    x: Array,  # [T, N, H]
    cos: Array,  # [T, pairs]
    sin: Array,  # [T, pairs]
    *,
    norm: Array | None = None,  # [H]
    eps: float = 0.0,
    offset: float = 0.0,
    num_rows: Array | int | None = None,
    interleaved: bool = False,
) -> Array:  # [T, N, H] float32
    """The first 2 * pairs lanes of every head rotated, as `kernels_pallas.rope.rotate`.

    In place, where nobody else needs x; normed first, as `rms_norm`, where there is a `norm`.
    """
    call = _call("rope", _floats(*x.shape), input_output_aliases={0: 0})
    scale = jnp.zeros(0, jnp.float32) if norm is None else norm
    operands = (x.astype(jnp.float32), cos, sin, scale, _rows(num_rows, x))
    return call(*operands, interleaved=interleaved, eps=np.float32(eps), offset=np.float32(offset))


def paged_attention(
    q: Array,  # [T, N, H]
    k: Array,  # [T, K, H]
    v: Array | None,  # [T, K, Hv]; None: a value is the first `value_dim` lanes of its key
    k_pages: Pages,  # [L, P, K, Z, H] or [P, K, Z, H]
    v_pages: Pages | None,  # as k_pages with Hv
    layer: Array | int | None,
    row_starts: Array,  # [R + 1] int32: sequence r asks in rows row_starts[r] .. row_starts[r + 1]
    kv_lens: Array,  # [R] int32: context lengths, this step's tokens included
    tables: Array,  # [R, M] int32: pages of each sequence
    num_seqs: Array | int,  # sequences from here on are padding
    groups: Groups | None = None,  # of sequences that begin with the same pages
    *,
    scale: float,
    window: Array | int = 0,
    soft_cap: float = 0.0,
    sinks: Array | None = None,  # [N] or [L, N]
    value_dim: int | None = None,
) -> tuple[Array, Array, Pages, Pages | None]:  # [T, N, Hv] f32, [T, N] f32, k_pages, v_pages
    """Stores k and v in the pages, then attends causally; the pages are updated in place.

    The stores of all tokens come first, so sequences that share a page written in this very step
    see it. Keys are visible within `window` positions (0: all). `soft_cap` c bounds a score s to
    c tanh(s / c). A sink is one more logit per head that joins the denominator, and the lse.
    Members of a group pass by its pages together, in whole blocks of 64 keys, and go on by
    themselves: no bit depends on it. Groups that do not come in the order of sequences are passed
    over, and so are all where there is a window.
    Pages may be float32, bfloat16, or uint16 bits of bfloat16; donate them, or they are copied.
    Stacks of eight and four bits (paged_attention/codec.py) are written to the reference's bits;
    what is read from them is rounded to bfloat16, and so are queries.
    """
    T, N, _ = q.shape
    value_dim = value_dim or (v if v is not None else q).shape[-1]
    _check_lanes(q, k, v, k_pages, v_pages, value_dim)
    sinks = jnp.zeros(0, jnp.float32) if sinks is None else sinks.astype(jnp.float32)
    pages = (k_pages,) if v is None else (k_pages, v_pages)
    rows = (x.astype(jnp.float32) for x in (q, k, v) if x is not None)
    attributes = {"scale": np.float32(scale), "soft_cap": np.float32(soft_cap)}
    kind = "attention" if v is not None else "latent_attention"
    if coded := isinstance(k_pages, QuantizedPages):
        attributes |= {f"{x}_parts": _parts(p) for x, p in zip("kv", pages, strict=False)}
    leaves, tree = jax.tree.flatten(pages)
    shared = jnp.zeros((3, 0), jnp.int32) if groups is None else jnp.stack(groups)
    operands = (*rows, *leaves, _int(layer), row_starts, kv_lens, tables, shared)
    first = len(operands) - len(leaves) - 5
    aliases = {first + i: 2 + i for i in range(len(leaves))}
    if value_dim == q.shape[-1]:  # what a query says takes its place
        aliases[0] = 0
    call = _call(
        f"coded_{kind}" if coded else "paged_attention" if v is not None else kind,
        (_floats(T, N, value_dim), _floats(T, N), *leaves),
        input_output_aliases=aliases,
    )
    out, lse, *leaves = call(*operands, _int(num_seqs), _int(window), sinks, **attributes)
    pages = jax.tree.unflatten(tree, leaves)
    return out, lse, pages[0], pages[1] if v is not None else None


def experts(
    x: Array,  # [T, D]
    ids: Array,  # [T, A] int32; an id outside [0, E) contributes nothing
    weights: Array,  # [T, A]
    w_gate: Array,  # [E, F, D] or [L, E, F, D]
    w_up: Array,  # as w_gate
    w_down: Array,  # [E, D, F] or [L, E, D, F]
    *,
    scales: tuple[Array, ...] = (),  # of int8 weights: without their last axis, float32
    layer: Array | int | None = None,
    num_rows: Array | int | None = None,
    activation: str = "silu",
) -> Array:  # [T, D] float32
    """Each row through its A experts' gated feed-forward layers, weighted and summed in order."""
    _check_activation(activation)
    call = _call("experts", _floats(*x.shape))
    weights, rows, index = weights.astype(jnp.float32), _rows(num_rows, x), _int(layer)
    operands = (x, ids, weights, rows, index, w_gate, w_up, w_down, *scales)
    return call(*operands, activation=activation)


def _call(target: str, outs, **options):
    if not available():
        raise RuntimeError(f"jaxserve_{target}: native CPU kernels are not available; see the log")
    return jax.ffi.ffi_call(f"jaxserve_{target}", outs, **options)


def _parts(pages: Pages | None) -> np.ndarray:
    """Lanes of the parts that have scales of their own; none where scales are calibrated."""
    parts = pages.parts if isinstance(pages, Int8Pages | Int4Pages) else ()
    return np.array(parts, np.int64)


def _check_lanes(
    q: Array, k: Array, v: Array | None, k_pages: Pages, v_pages: Pages | None, value_dim: int
) -> None:
    """Kernels take rows to be as long as those of pages, and turn values back by whole parts.

    Raises:
        UnsupportedError: rows are shorter, or `value_dim` cuts a part.
    """
    owner = k_pages if v_pages is None else v_pages
    for x, pages in ((q, k_pages), (k, k_pages), (v, owner)):
        if x is not None and x.shape[-1] != pages.shape[-1]:
            raise UnsupportedError(
                f"rows of {x.shape[-1]} lanes do not fit pages of {pages.shape[-1]}"
            )
    if value_dim > owner.shape[-1] or value_dim != whole_parts(owner, value_dim):
        raise UnsupportedError(
            f"value_dim={value_dim} must be at most {owner.shape[-1]} lanes, and end a part where "
            "pages are of four bits"
        )


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _int(value: Array | int | None) -> Array:
    return jnp.asarray(0 if value is None else value, jnp.int32)


def _rows(num_rows: Array | int | None, x: Array) -> Array:
    return _int(x.shape[0] if num_rows is None else num_rows)


def _check_activation(name: str) -> None:
    if name not in ("silu", "gelu_tanh"):
        raise ValueError(f"activation={name!r} must be 'silu' or 'gelu_tanh'")
