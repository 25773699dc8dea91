"""Native CPU kernels against plain numpy, and their promise of batch invariance, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")

DTYPES = ("float32", "bfloat16", "uint16")
ROW_COUNTS = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 33, 64, 70)


def normal(seed, *shape, scale=1.0):
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def stored(x, dtype):
    """x as the kernels may receive it, and the numbers it then stands for."""
    if dtype == "float32":
        return jnp.asarray(x), x.astype(np.float64)
    rounded = jnp.asarray(x, jnp.bfloat16)
    bits = jax.lax.bitcast_convert_type(rounded, jnp.uint16) if dtype == "uint16" else rounded
    return bits, np.asarray(rounded.astype(jnp.float32), np.float64)


def rounded_like(x, dtype):
    return stored(x, "float32" if dtype == "float32" else "bfloat16")[1]


def assert_close(got, want, tolerance=2e-6):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=tolerance * max(1e-30, np.abs(want).max()), rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2048, 96), (33, 7), (100, 37), (64, 1), (5000, 13)])
@pytest.mark.parametrize("rows", [1, 6, 131])
def test_linear(dtype, shape, rows):
    k, n = shape
    x = normal(0, rows, k)
    w, exact = stored(normal(1, n, k), dtype)
    (y,) = jax.jit(lambda x, w: cpu.linear(x, (w,)))(x, w)
    assert_close(y, rounded_like(x, dtype) @ exact.T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_many_weights_layers_and_padding(dtype):
    x = normal(0, 9, 80)
    (wq, q), (wk, k) = (stored(normal(s, 3, n, 80), dtype) for s, n in ((1, 50), (2, 11)))
    run = jax.jit(
        lambda x, wq, wk, layer, rows: cpu.linear(x, (wq, wk), layer=layer, num_rows=rows)
    )
    for layer in range(3):
        yq, yk = run(x, wq, wk, layer, 7)
        exact = rounded_like(x[:7], dtype)
        assert_close(yq[:7], exact @ q[layer].T)
        assert_close(yk[:7], exact @ k[layer].T)
        assert not np.asarray(yq[7:]).any() and not np.asarray(yk[7:]).any()


def test_linear_takes_bfloat16_rows():
    x, w = (jnp.asarray(normal(s, 5, 64), jnp.bfloat16) for s in (0, 1))
    (want,) = cpu.linear(x.astype(jnp.float32), (w,))
    for rows in (x, jax.lax.bitcast_convert_type(x, jnp.uint16)):
        np.testing.assert_array_equal(cpu.linear(rows, (w,))[0], want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [2500, 90])
def test_linear_rows_do_not_depend_on_their_neighbours(dtype, k):
    x = normal(0, 70, k)
    w, _ = stored(normal(1, 37, k), dtype)
    run = jax.jit(lambda x: cpu.linear(x, (w,))[0])
    all_rows = np.asarray(run(x))
    for rows in range(1, 71):
        np.testing.assert_array_equal(run(x[:rows]), all_rows[:rows])
        np.testing.assert_array_equal(run(x[70 - rows :]), all_rows[70 - rows :])


def test_linear_inside_scan_and_while():
    x, w = normal(0, 4, 64), normal(1, 5, 64, 64, scale=0.1)
    step = lambda x, i: cpu.linear(x, (w,), layer=i)[0]  # noqa: E731
    scanned = jax.jit(lambda x: jax.lax.scan(lambda x, i: (step(x, i), None), x, jnp.arange(5))[0])
    looped = jax.jit(lambda x: jax.lax.fori_loop(0, 5, lambda i, x: step(x, i), x))
    want = x.astype(np.float64)
    for layer in w:
        want = want @ layer.T.astype(np.float64)
    assert_close(scanned(x), want, 1e-5)
    np.testing.assert_array_equal(scanned(x), looped(x))


def activate(name, x):
    if name == "silu":
        return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("rows", [1, 19, 140])
def test_gated_linear(dtype, activation, rows):
    x = normal(0, rows + 2, 72)
    (w_gate, gate), (w_up, up) = (stored(normal(s, 2, 101, 72), dtype) for s in (1, 2))
    run = jax.jit(lambda x: cpu.gated_linear(x, w_gate, w_up, layer=1, num_rows=rows,
                                             activation=activation))  # fmt: skip
    exact = rounded_like(x[:rows], dtype)
    want = activate(activation, exact @ gate[1].T) * (exact @ up[1].T)
    assert_close(run(x)[:rows], want)
    np.testing.assert_array_equal(run(x)[:1], run(x[:1].repeat(rows + 2, 0))[:1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2048, 128, 50])
def test_rms_norm(dtype, width):
    x = normal(0, 300, width, scale=3.0)
    scale, exact = stored(normal(1, 2, width), dtype)
    run = jax.jit(
        lambda x, rows: cpu.rms_norm(x, scale, eps=1e-6, layer=1, num_rows=rows, offset=1.0)
    )
    got = run(x, 290)
    wide = x.astype(np.float64)
    want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * (1 + exact[1])
    assert_close(got[:290], want[:290], 1e-6)
    assert not np.asarray(got[290:]).any()
    np.testing.assert_array_equal(run(x[:1], 1), got[:1])
