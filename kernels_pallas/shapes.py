"""Named dimensions of an op's arguments, and one clear error where they do not go together."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def check(op: str, /, **arguments: tuple[Any, str]) -> dict[str, int]:
    """The size of each named dimension of arguments that go together.

    Args:
        op: whose arguments they are, for the message.
        arguments: an array and its form, by name. A form is a type and dimensions: "int32 R+1 M"
            is an int32 array of two axes, the first of which is one longer than R is elsewhere.
            The type "float" or "int" is any of that kind, and "any" any at all.

    Raises:
        ValueError: an argument is no array, has another type or another number of axes, or a
            dimension has two sizes. The message has what is there and what was expected.
    """
    sizes = dict[str, int]()
    for name, (x, form) in arguments.items():
        kind, *dims = form.split()
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            seen = None if x is None else f"of type {type(x).__name__}"
        elif _is(kind, x.dtype) and _fits(dims, x.shape, sizes):
            continue
        else:
            seen = f"{x.dtype}{list(x.shape)}"
        raise ValueError(f"{op}: {name} is {seen}: expected {_expected(kind, dims, sizes)}")
    return sizes


def check_heads(op: str, N: int, K: int) -> None:
    """Raises ValueError where N heads of queries are no multiple of K heads of keys."""
    if not K or N % K:
        raise ValueError(f"{op}: {N=} heads of queries: expected a multiple of {K=} heads of keys")


def check_result(op: str, dtype: Any) -> None:
    """Raises ValueError where a product's result is asked for in a type that it cannot have."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"{op}: out_dtype is {jnp.dtype(dtype)}: expected bfloat16 or float32")


def _is(kind: str, dtype: Any) -> bool:
    kinds = {"any": jnp.generic, "float": jnp.floating, "int": jnp.integer}
    return jnp.issubdtype(dtype, kinds[kind]) if kind in kinds else dtype == jnp.dtype(kind)


def _fits(dims: list[str], shape: tuple[int, ...], sizes: dict[str, int]) -> bool:
    """Whether a shape has these dimensions; if so, `sizes` has learnt those that were new."""
    if len(dims) != len(shape):
        return False
    found = {}
    for dim, n in zip(dims, shape, strict=True):
        name, _, more = dim.partition("+")
        if (sizes | found).setdefault(name, n - int(more or 0)) != n - int(more or 0):
            return False
        found[name] = n - int(more or 0)
    sizes |= found
    return True


def _expected(kind: str, dims: list[str], sizes: dict[str, int]) -> str:
    def described(dim: str) -> str:
        name, _, more = dim.partition("+")
        return f"{dim}={sizes[name] + int(more or 0)}" if name in sizes else dim

    kind = {"any": "an array ", "float": "floats ", "int": "integers "}.get(kind, kind)
    return f"{kind}[{', '.join(described(dim) for dim in dims)}]"
