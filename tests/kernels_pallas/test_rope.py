"""Rotary embedding against its definition: pairs of lanes as complex numbers."""

import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from kernels_pallas.rope import rotate

RNG = np.random.default_rng(0)


def turned(x, angles, interleaved):
    pairs = angles.shape[-1]
    lanes, rest = x[..., : 2 * pairs].astype(np.float64), x[..., 2 * pairs :]
    a, b = lanes[..., 0::2], lanes[..., 1::2]
    if not interleaved:
        a, b = lanes[..., :pairs], lanes[..., pairs:]
    z = (a + 1j * b) * np.exp(1j * angles[..., None, :])
    return np.concatenate([z.real, z.imag, rest], -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [8, 3])
def test_it_turns_pairs_and_leaves_the_rest(pairs, interleaved):
    x = RNG.standard_normal((2, 5, 3, 16)).astype(np.float32)
    angles = RNG.standard_normal((2, 5, pairs)) * 9
    table = tuple(jnp.asarray(f(angles)[:, :, None], jnp.float32) for f in (np.cos, np.sin))
    y = rotate(jnp.asarray(x), table, interleaved=interleaved)
    np.testing.assert_allclose(y, turned(x, angles, interleaved), atol=1e-5)
    half = rotate(jnp.asarray(x, jnp.bfloat16), table, interleaved=interleaved)
    assert half.dtype == jnp.bfloat16


def test_gradients():
    x = jnp.asarray(RNG.standard_normal((1, 2, 1, 6)), jnp.float32)
    angles = jnp.asarray(RNG.standard_normal((1, 2, 1, 2)), jnp.float32)
    table = (jnp.cos(angles), jnp.sin(angles))
    jax.test_util.check_grads(
        lambda x: jnp.sin(rotate(x, table)), (x,), order=1, modes=["rev"], atol=2e-2, rtol=2e-2
    )
