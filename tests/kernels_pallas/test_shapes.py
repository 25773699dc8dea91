"""Arguments that do not go together are refused with what is there and what was expected."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import shapes
from kernels_pallas.flash_attention import flash_attention
from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.int8_matmul import int8_matmul
from kernels_pallas.linear import gated_linear, linear
from kernels_pallas.paged_attention import Ragged
from kernels_pallas.paged_attention.ops import page_attention, page_write
from kernels_pallas.rms_norm import rms_norm
from kernels_pallas.rms_norm_quantize import rms_norm_quantize
from kernels_pallas.sample import sample
from kernels_pallas.target import Target

CPU = Target("cpu")


def floats(*shape: int) -> jax.Array:
    return jnp.ones(shape, jnp.float32)


def ints(*shape: int, dtype: Any = jnp.int32) -> jax.Array:
    return jnp.ones(shape, dtype)


def bytes_(*shape: int) -> jax.Array:
    return ints(*shape, dtype=jnp.int8)


BATCH = Ragged(
    np.array([0, 1, 4], np.int32),
    np.array([5, 3], np.int32),
    np.array([[0], [1]], np.int32),
    np.int32(2),
)
PAGES = floats(1, 2, 2, 8, 32)


def test_sizes_by_name():
    found = shapes.check("op", x=(bytes_(3, 5), "int8 T K"), starts=(ints(4), "int32 T+1"))
    assert found == {"T": 3, "K": 5}


@pytest.mark.parametrize(
    ("x", "form", "expected"),
    [
        (floats(3, 4), "float32 T K", "float32[3, 4]: expected float32[T=2, K=5]"),
        (floats(4), "float T+1", "float32[4]: expected floats [T+1=3]"),
        (floats(2), "int T", "float32[2]: expected integers [T=2]"),
        ([1.0], "any T", "of type list: expected an array [T=2]"),
        (None, "float T", "None: expected floats [T=2]"),
    ],
)
def test_what_is_there_and_what_was_expected(x: Any, form: str, expected: str):
    with pytest.raises(ValueError) as raised:
        shapes.check("op", first=(floats(2, 5), "float32 T K"), x=(x, form))
    assert str(raised.value) == f"op: x is {expected}"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"q": floats(1, 16, 4, 32)},
            r"k is float32\[1, 2, 16, 32\]: expected floats \[B=1, K, T=4",
        ),
        ({"q": floats(1, 3, 16, 32)}, "N=3 heads of queries: expected a multiple of K=2"),
        ({"k": floats(1, 2, 8, 32)}, "k is float32.* expected floats .*T=16"),
        ({"v": floats(1, 4, 16, 32)}, "v is float32.* expected floats .*K=2"),
        ({"segments": ints(16)}, r"segments is int32\[16\]: expected int32\[B=1, T=16\]"),
        ({"segments": floats(1, 16)}, "segments is float32"),
        ({"sinks": floats(2)}, r"sinks is float32\[2\]: expected floats \[N=4\]"),
    ],
)
def test_flash_attention(changed: dict[str, Any], message: str):
    kv = floats(1, 2, 16, 32)
    args = {"q": floats(1, 4, 16, 32), "k": kv, "v": kv, "segments": ints(1, 16)} | changed
    operands = [args.pop(name) for name in ("q", "k", "v", "segments")]
    with pytest.raises(ValueError, match=f"^flash_attention: {message}"):
        flash_attention(*operands, scale=0.1, target=CPU, **args)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": floats(4, 4, 64)}, "q is 64 lanes wide: expected at most 32 of k_pages"),
        ({"q": floats(4, 3, 32)}, "N=3 heads of queries"),
        ({"k_pages": PAGES[0]}, r"k_pages is float32.* expected an array \[L, P, K, Z, W\]"),
        ({"v_pages": floats(1, 2, 1, 8, 32)}, "v_pages is float32.*K=2"),
        ({"batch": BATCH._replace(kv_lens=np.ones(1, np.int32))}, r"row_starts is .*\[R\+1=2\]"),
        ({"batch": BATCH._replace(tables=floats(2, 1))}, "tables is float32.* expected int32"),
        ({"batch": tuple(BATCH)}, "batch is of type tuple: expected Ragged"),
        ({"value_dim": 64}, "value_dim is 64 lanes wide: expected at most 32 of v_pages"),
        ({"sinks": floats(2)}, r"sinks is float32\[2\]: expected floats \[N=4\]"),
    ],
)
def test_page_attention(changed: dict[str, Any], message: str):
    args = {"q": floats(4, 4, 32), "k_pages": PAGES, "v_pages": PAGES, "batch": BATCH} | changed
    q, k_pages, v_pages, batch = (args.pop(x) for x in ("q", "k_pages", "v_pages", "batch"))
    with pytest.raises(ValueError, match=f"^page_attention: {message}"):
        page_attention(q, k_pages, v_pages, 0, batch, scale=0.1, target=CPU, **args)


@pytest.mark.parametrize(
    ("v_pages", "k", "v", "message"),
    [
        (PAGES, floats(4, 1, 32), floats(4, 2, 32), r"k is float32.* \[T, K=2, H\]"),
        (PAGES, floats(4, 2, 64), floats(4, 2, 32), "k is 64 lanes wide: expected at most 32"),
        (PAGES, floats(4, 2, 32), floats(3, 2, 32), "v is float32.*T=4"),
        (PAGES, floats(4, 2, 32), None, "v is None with v_pages: expected both, or neither"),
        (None, floats(4, 2, 32), floats(4, 2, 32), "v_pages is None with v: expected both"),
    ],
)
def test_page_write(v_pages: Any, k: Any, v: Any, message: str):
    with pytest.raises(ValueError, match=f"^page_write: {message}"):
        page_write(PAGES, v_pages, k, v, 0, BATCH, target=CPU)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, floats(50), r"scores is float32\[50\]: expected floats \[R, V\]"),
        (0, bytes_(3, 50), "scores is int8"),
        (1, floats(2), r"u is float32\[2\]: expected floats \[R=3\]"),
        (2, 1.0, "temperature is of type float"),
        (2, floats(1), r"temperature is float32\[1\]: expected floats \[R=3\]"),
        (3, floats(3), r"top_k is float32\[3\]: expected integers \[R=3\]"),
    ],
)
def test_sample(place: int, value: Any, message: str):
    args = [floats(3, 50), floats(3) / 2, floats(3), ints(3), floats(3), floats(3)]
    args[place] = value
    with pytest.raises(ValueError, match=f"^sample: {message}"):
        sample(*args, target=CPU)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (bytes_(2, 4, 8), {}, r"x is int8\[2, 4, 8\]: expected int8\[T, K\]"),
        (floats(4, 8), {}, "x is float32.* expected int8"),
        (bytes_(4, 8), {"out_dtype": jnp.int8}, "out_dtype is int8: expected bfloat16 or float32"),
    ],
)
def test_products(x: Any, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^int8_matmul: {message}"):
        int8_matmul(x, floats(4), bytes_(6, 8), floats(6), target=CPU, **options)


def test_grouped_products():
    with pytest.raises(ValueError, match=r"^grouped_matmul: x is float32\[16\]: .*\[M, K\]"):
        grouped_matmul(floats(16), floats(2, 4, 16), ints(2), target=CPU)
    with pytest.raises(ValueError, match=r"^grouped_matmul: out_dtype is float16"):
        grouped_matmul(floats(8, 16), floats(2, 4, 16), ints(2), target=CPU, out_dtype=jnp.float16)


def test_rows_that_are_normed():
    with pytest.raises(ValueError, match=r"scale is float32\[1\]: expected floats \[D=8\]"):
        rms_norm_quantize(floats(4, 8), floats(1), eps=1e-6, target=CPU)
    with pytest.raises(ValueError, match=r"scale is \[1\] with x \[4, 8\]: expected \[8\]"):
        rms_norm(floats(4, 8), floats(1), eps=1e-6)


def test_weights_that_lie_the_other_way():
    with pytest.raises(
        ValueError, match=r"\[8, 6\] with x \[4, 8\]: .* outputs first and inputs last"
    ):
        linear(floats(4, 8), floats(8, 6))
    with pytest.raises(ValueError, match=r"activation='relu': expected one of .*silu"):
        gated_linear(floats(4, 8), floats(6, 8), floats(6, 8), activation="relu")


def test_a_target_is_named():
    with pytest.raises(
        TypeError, match=r"target is 'cpu': expected a Target, such as Target\('cpu'\)"
    ):
        rms_norm_quantize(floats(4, 8), floats(8), eps=1e-6, target="cpu")  # pyright: ignore
    with pytest.raises(TypeError, match="unexpected keyword argument 'axis'"):
        int8_matmul(bytes_(4, 8), floats(4), bytes_(6, 8), floats(6), target=CPU, axis=1)
