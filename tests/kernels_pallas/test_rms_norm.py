"""RMSNorm against its formula."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.rms_norm import rms_norm
from kernels_pallas.rms_norm_quantize import rms_norm_quantize
from kernels_pallas.weight import StackedWeight


def formula(x, scale, eps, offset=0.0):
    x, scale = np.asarray(x, np.float64), np.asarray(scale, np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * (offset + scale)


@given(
    seed=st.integers(0, 2**32),
    size=st.sampled_from([1, 5, 64]),
    eps=st.sampled_from([1e-6, 1e-2]),
    spread=st.sampled_from([1e-4, 1.0, 1e4]),
)
@settings(max_examples=25, deadline=None)
def test_it_is_its_formula(seed, size, eps, spread):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((2, 3, size)) * spread).astype(np.float32)
    scale = rng.standard_normal(size).astype(np.float32)
    y = rms_norm(jnp.asarray(x), jnp.asarray(scale), eps=eps)
    np.testing.assert_allclose(y, formula(x, scale, eps), rtol=2e-5, atol=1e-6)


def test_offset_is_added_to_the_scale():
    x, scale = jnp.arange(6.0).reshape(2, 3), jnp.array([0.0, 0.5, -0.5])
    y = rms_norm(x, scale, eps=1e-6, offset=1.0)
    np.testing.assert_allclose(y, formula(x, scale, 1e-6, 1.0), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_types_are_normed_in_float32_and_come_back(dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 256)) * 100, dtype)
    scale = jnp.ones(256, dtype)
    y = rms_norm(x, scale, eps=1e-6)
    assert y.dtype == dtype
    np.testing.assert_allclose(
        y.astype(jnp.float32), formula(x.astype(jnp.float32), scale, 1e-6), rtol=1e-2
    )


def test_zeros_stay_zeros_and_their_gradient_is_finite():
    zeros, scale = jnp.zeros((2, 4)), jnp.ones(4)
    assert not np.any(rms_norm(zeros, scale, eps=1e-6))
    gradient = jax.grad(lambda x: rms_norm(x, scale, eps=1e-6).sum())(zeros)
    assert np.isfinite(gradient).all()


def test_a_scale_in_its_stack_and_gradients():
    rng = np.random.default_rng(0)
    stack = jnp.asarray(rng.standard_normal((3, 8)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((2, 8)), jnp.float32)
    stacked = rms_norm(x, StackedWeight(stack, jnp.int32(2)), eps=1e-5)
    np.testing.assert_array_equal(stacked, rms_norm(x, stack[2], eps=1e-5))
    jax.test_util.check_grads(
        lambda x, s: jnp.sum(jnp.sin(rms_norm(x, s, eps=1e-5))),
        (x, stack[0]),
        order=1,
        modes=["rev"],
        atol=2e-2,
        rtol=2e-2,
    )


@pytest.mark.parametrize("bad", [np.inf, np.nan])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_a_row_that_is_not_finite_has_no_finite_scale_on_tpu(bad, scale):
    """Nor where the scale of that lane is 0, by which an infinity becomes NaN."""
    x, scales = jnp.ones((3, 256)).at[1, 3].set(bad), jnp.ones(256).at[3].set(scale)
    _, steps = rms_norm_quantize.run("mosaic_tpu", x, scales, eps=1e-6, interpret=True)
    np.testing.assert_array_equal(np.isfinite(steps), [True, False, True])
