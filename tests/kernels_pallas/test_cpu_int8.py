"""W8A8 on the native CPU kernels: the reference's numbers, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import cpu
from kernels_pallas.linear import GATES, product
from kernels_pallas.quantize import quantize_rows
from kernels_pallas.weight import Int8Weight, StackedWeight
from moe.experts import Experts
from moe.experts import experts as experts_reference

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")


def normal(seed: int, *shape: int) -> jax.Array:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=shape) * np.exp(rng.normal(size=(*shape[:-1], 1)))
    return jnp.asarray(rows, jnp.float32)


quantized = jax.jit(quantize_rows)


def weight(seed: int, *shape: int) -> Int8Weight:
    return Int8Weight(*quantized(normal(seed, *shape)))


def linear(x: jax.Array, *weights: Int8Weight, **options) -> tuple[jax.Array, ...]:
    values, scales = tuple(w.values for w in weights), tuple(w.scale for w in weights)
    return jax.jit(lambda x: cpu.linear(x, values, scales=scales, **options))(x)


def test_quantized_rows_are_within_half_a_step():
    x = normal(0, 40, 300)
    values, scale = quantize_rows(x)
    assert values.dtype == jnp.int8 and jnp.abs(values.astype(jnp.int32)).max() == 127
    assert (
        jnp.abs(values.astype(jnp.float32) * scale[:, None] - x) <= 0.5001 * scale[:, None]
    ).all()
    assert (jnp.abs(values.astype(jnp.int32)).max(1) == 127).all()


@pytest.mark.parametrize("k", [16, 64, 768, 100, 2064, 4096])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 24, 25, 131])
def test_linear_equals_the_reference_bit_for_bit(k: int, rows: int):
    x, a, b = normal(k, rows, k), weight(1, 96, k), weight(2, 37, k)
    for found, w in zip(linear(x, a, b), (a, b), strict=True):
        np.testing.assert_array_equal(found, jax.jit(product)(x, w))


def test_extreme_values_do_not_saturate():
    """Sixteen-bit sums of pairs would: 255 x 127 twice."""
    for sign in (1, -1):
        w = Int8Weight(jnp.full((32, 512), sign * 127, jnp.int8), jnp.ones(32))
        x = jnp.full((5, 512), 3.0)
        np.testing.assert_array_equal(linear(x, w)[0], product(x, w))


def test_sums_may_wrap_around_on_the_way():
    """Those with 128 added to every weight do, and what is left fits again."""
    k = 70_016
    w = Int8Weight(jnp.full((32, k), 127, jnp.int8), jnp.ones(32))
    for rows in (1, 5):
        x = jnp.full((rows, k), 3.0)
        np.testing.assert_array_equal(linear(x, w)[0], product(x, w))


def test_layers_of_a_stack_padding_and_zero_rows():
    stack = weight(0, 3, 48, 64)
    x = normal(1, 9, 64).at[2].set(0)
    found = linear(x, stack, layer=2, num_rows=5)[0]
    want = product(x[:5], StackedWeight(stack, 2).take())
    np.testing.assert_array_equal(found[:5], want)
    assert not found[5:].any() and not found[2].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_stays_so_and_is_alone(bad: float):
    x, w = normal(0, 20, 64), weight(1, 32, 64)
    found = np.asarray(linear(x.at[7, 33].set(bad), w)[0])
    assert not np.isfinite(found[7]).any()
    rest = np.arange(20) != 7
    np.testing.assert_array_equal(found[rest], np.asarray(linear(x, w)[0])[rest])


@pytest.mark.parametrize("rows", [1, 24, 90])
def test_gated_linear(rows: int):
    x, gate, up = normal(0, rows, 256), weight(1, 112, 256), weight(2, 112, 256)
    scales = (gate.scale, up.scale)
    found = jax.jit(lambda x: cpu.gated_linear(x, gate.values, up.values, scales=scales))(x)
    want = GATES["silu"](product(x, gate), product(x, up))
    np.testing.assert_allclose(found, want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 30, 130])
@pytest.mark.parametrize("D, F", [(96, 80), (128, 192)])
def test_experts(rows: int, D: int, F: int):
    E, A = 6, 2
    rng = np.random.default_rng(rows)
    ids = jnp.asarray(rng.integers(0, E + 1, (rows, A)), jnp.int32)  # E names no expert
    share = jnp.asarray(rng.random((rows, A)), jnp.float32)
    p = Experts(*(weight(i, 2, E, *s) for i, s in enumerate([(F, D), (F, D), (D, F)])))
    layer = jax.tree.map(
        lambda w: StackedWeight(w, 1), p, is_leaf=lambda w: isinstance(w, Int8Weight)
    )
    x = normal(9, rows, D)
    values = [p.w_gate.values, p.w_up.values, p.w_down.values]
    scales = (p.w_gate.scale, p.w_up.scale, p.w_down.scale)
    found = jax.jit(lambda x: cpu.experts(x, ids, share, *values, scales=scales, layer=1))(x)
    reference = jax.jit(experts_reference, static_argnames="activation")
    want = reference(x, ids, share, layer, activation="silu")
    # A gate that rounds otherwise in its last bit may move one hidden value by a step.
    error = np.abs(np.asarray(found - want)).max(1) / np.abs(np.asarray(want)).max(1).clip(1e-9)
    assert np.median(error) < 1e-6 and error.max() < 0.02


def test_scales_that_do_not_fit_are_refused():
    w = weight(0, 32, 64)
    with pytest.raises(jax.errors.JaxRuntimeError, match="scales"):
        linear(normal(1, 2, 64), Int8Weight(w.values, w.scale[:-1]))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"index|range|scales"):
        cpu.linear(normal(1, 2, 64), (w.values,))[0].block_until_ready()
