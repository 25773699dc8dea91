"""Native kernels whose result takes the place of an operand, where nobody else needs that."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import cpu
from kernels_pallas.cpu import bodies
from kernels_pallas.linear import linear as linear_reference
from kernels_pallas.quantize import quantize_rows
from kernels_pallas.rope import rotate
from kernels_pallas.weight import Int8Weight, StackedWeight

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def weight(kind, *shape):
    w = normal(1, *shape)
    return Int8Weight(*quantize_rows(w)) if kind == "int8" else w.astype(kind)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("k", "n"), [(256, 96), (256, 100), (100, 37)])
def test_a_product_is_added_to_its_residual(kind, k, n):
    """To the bit what a product by itself and a sum are, in a batch of any size."""
    x, residual, w = normal(0, 200, k), normal(2, 200, n), weight(kind, n, k)
    run = jax.jit(bodies.linear)
    want = np.asarray(run(x, w)) + np.asarray(residual)
    for rows in (1, 3, 5, 24, 40, 200):
        at = slice(200 - rows, 200)
        np.testing.assert_array_equal(run(x[at], w, residual=residual[at]), want[at])


def test_padding_keeps_its_residual_and_layers_are_found():
    x, residual, stack = normal(0, 1, 9, 64), normal(2, 1, 9, 48), normal(1, 3, 48, 64)
    w = StackedWeight(stack, jnp.int32(2))
    got = jax.jit(bodies.linear)(x, w, residual=residual, num_rows=jnp.int32(5))
    want = linear_reference(x, w, residual=residual)
    np.testing.assert_allclose(got[:, :5], want[:, :5], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got[:, 5:], residual[:, 5:])
    half = residual.astype(jnp.bfloat16)  # a product is rounded before it is added
    got = bodies.linear(x.astype(jnp.bfloat16), w, residual=half)
    np.testing.assert_array_equal(got, half + bodies.linear(x.astype(jnp.bfloat16), w))


def test_a_residual_that_is_needed_again_stays_as_it_was():
    x, residual, w = normal(0, 6, 64), normal(2, 6, 64), normal(1, 64, 64)
    kept = np.array(residual)

    @jax.jit
    def run(x, residual):
        return bodies.linear(x, w, residual=residual), residual * 2

    y, doubled = run(x, residual)
    np.testing.assert_array_equal(residual, kept)
    np.testing.assert_array_equal(doubled, kept * 2)
    np.testing.assert_array_equal(y, np.asarray(bodies.linear(x, w)) + kept)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [32, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_heads_are_normed_and_rotated(interleaved, pairs, dtype):
    x, angles, scale = normal(0, 1, 70, 3, 64), normal(1, 70, pairs) * 9, normal(2, 64)
    cos, sin, scale = jnp.cos(angles), jnp.sin(angles), scale.astype(dtype)
    how = {"norm": scale, "eps": 1e-6, "offset": 1.0, "interleaved": interleaved}
    run = jax.jit(partial(cpu.rope, **how))
    got = run(x[0], cos, sin, num_rows=66)
    want = rotate(x, (cos[None, :, None], sin[None, :, None]), **how)[0]
    np.testing.assert_allclose(got[:66], want[:66], atol=1e-5)
    assert not np.asarray(got[66:]).any()
    np.testing.assert_array_equal(run(x[0, 3:4], cos[3:4], sin[3:4]), got[3:4])
    with pytest.raises(Exception, match="scale must be"):
        cpu.rope(x[0], cos, sin, norm=jnp.ones(63)).block_until_ready()


def test_a_layer_makes_no_copies():
    """Of the residual stream, which a scan carries, or of queries on their way through a layer."""
    D, N, H, T, Z = 64, 4, 32, 40, 16
    wq, wo = normal(1, 3, N, H, D), normal(2, 3, D, N * H)
    angles = jnp.ones((T, H // 2))
    pages = (jnp.zeros((3, 4, N, Z, H)),) * 2
    batch = jnp.array([0, T]), jnp.array([T]), jnp.arange(4)[None], 1

    def layer(carry, i):
        x, pages = carry
        h = bodies.rms_norm(x, jnp.ones(D), eps=1e-6)
        q = bodies.linear(h, StackedWeight(wq, i)).reshape(T, N, H)
        k = v = jnp.ones((T, N, H))
        q = cpu.rope(q, angles, angles, norm=jnp.ones(H))
        o, _, *pages = cpu.paged_attention(q, k, v, *pages, i, *batch, scale=0.1)
        x = bodies.linear(o.reshape(1, T, -1), StackedWeight(wo, i), residual=x)
        return (x, tuple(pages)), None

    def layers(x, pages):
        return jax.lax.scan(layer, (x, pages), jnp.arange(3))[0]

    run = jax.jit(layers, donate_argnums=(0, 1)).lower(normal(0, 1, T, D), pages).compile()
    copied = re.findall(r"f32\[([\d,]+)\]\S* copy\(", run.as_text())
    assert f"1,{T},{D}" not in copied and f"{T},{N},{H}" not in copied and f"{T},{D}" not in copied


def test_residuals_that_do_not_fit_are_refused():
    x, w = normal(0, 2, 8), normal(1, 8, 8)
    with pytest.raises(ValueError, match=r"residual \(3, 8\) does not fit a product \(2, 8\)"):
        bodies.linear(x, w, residual=normal(2, 3, 8))


def test_a_residual_of_several_axes_is_added_to():
    x, w = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(5, 32), (4, 8, 32)]))
    residual = jax.random.normal(jax.random.key(2), (5, 4, 8))
    got = bodies.linear(x, w, residual=residual)
    want = linear_reference(x, w, residual=residual)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_residual_goes_with_one_weight_whatever_its_dtype(dtype):
    x, w = jnp.ones((2, 8), dtype), jnp.ones((8, 8))
    for linear in (linear_reference, bodies.linear):
        with pytest.raises(ValueError, match="one weight, not with 2"):
            linear(x, w, w, residual=x)
