"""What is special about the W8A8 product: exact sums, scales per layer, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.int8_matmul import int8_matmul
from kernels_pallas.int8_matmul.cases import case
from kernels_pallas.int8_matmul.mosaic_gpu import Tile as GpuTile
from kernels_pallas.int8_matmul.mosaic_tpu import Tile as TpuTile
from kernels_pallas.op import UnsupportedError
from kernels_pallas.rms_norm_quantize import quantize_rows
from tests.kernels_pallas import simulators
from tests.sparing import sparing


def same(body, T, N, K, tile=None, interpret=True, **options):
    one = case(T, N, K, out_dtype=jnp.float32, **options)
    args, arrays = one.make(jax.random.key(0))
    found = int8_matmul.run(body, *args, tile=tile, interpret=interpret, **arrays, **one.options)
    wanted = int8_matmul.reference(*args, **arrays, **one.options)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


def test_the_reference_is_the_formula():
    rng = np.random.default_rng(0)
    x, w, up = (rng.integers(-127, 128, shape) for shape in ((5, 32), (3, 7, 32), (3, 7, 32)))
    sx, sw, su = (rng.random(shape) / 100 for shape in ((5,), (3, 7), (3, 7)))
    gate, linear = x @ w[1].T * sx[:, None] * sw[1], x @ up[1].T * sx[:, None] * su[1]

    def run(**options):
        f32 = [a.astype(np.float32) for a in (sx, sw, su)]
        more = {"up": up.astype(np.int8), "up_scale": f32[2]} if "activation" in options else {}
        return int8_matmul.reference(
            x.astype(np.int8), f32[0], w.astype(np.int8), f32[1],
            layer=1, out_dtype=jnp.float32, **options, **more,
        )  # fmt: skip

    np.testing.assert_allclose(run(), gate, rtol=1e-5)
    bias = rng.random((3, 7))
    np.testing.assert_allclose(run(bias=bias), gate + bias[1], rtol=1e-5)
    silu = gate / (1 + np.exp(-gate)) * linear
    np.testing.assert_allclose(run(activation="silu"), silu, rtol=1e-4, atol=1e-6)


def test_sums_are_exact_where_float32_would_round():
    """The largest sum of K = 4096 needs 26 bits; a float32 sum of the products would lose some."""
    x = jnp.full((8, 4096), 127, jnp.int8)
    w = x.at[:, -1].set(1)
    one = jnp.ones(8)
    exact = 127 * 127 * 4095 + 127
    found = int8_matmul.reference(x, one, w, one, out_dtype=jnp.float32)
    assert np.all(np.asarray(found) == np.float32(exact))


def test_products_of_quantized_rows_are_close_to_those_of_the_rows():
    a, b = jax.random.split(jax.random.key(0))
    x, w = jax.random.normal(a, (16, 512)), jax.random.normal(b, (64, 512))
    found = int8_matmul.reference(*quantize_rows(x), *quantize_rows(w), out_dtype=jnp.float32)
    wanted = x @ w.T
    assert np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)) < 0.015


@pytest.mark.slow
@given(
    T=st.integers(1, 100), N=st.integers(1, 3), K=st.integers(1, 4), layers=st.integers(0, 10),
    form=st.sampled_from(["plain", "bias", "silu", "gelu_tanh"]),
    block_k=st.sampled_from([128, 256]),
)  # fmt: skip
@settings(max_examples=6, deadline=None)
def test_any_shape_on_tpu(T, N, K, layers, form, block_k):
    gate = form if form in ("silu", "gelu_tanh") else None
    # the last blocks of rows and columns are cut
    tile = TpuTile(block_m=64, block_n=256, block_k=block_k)
    same("mosaic_tpu", T, N * 128, K * 128, tile, layers=layers, biased=form == "bias",
         activation=gate)  # fmt: skip


@pytest.mark.parametrize("T", [160, 320, 600])
@pytest.mark.parametrize("device", ["v5e", "v6e"])
def test_blocks_of_several_parts_on_tpu(T, device):
    """A part that is cut, parts side by side, and a second stretch that is cut."""
    same("mosaic_tpu", T, 1024, 128, TpuTile.wanted(device), biased=True)


@pytest.mark.parametrize("T", [1, 20, 64])
@pytest.mark.parametrize(
    ("warpgroups", "block_k"), sparing([(1, 128), (1, 256), (2, 128)], (1, 256))
)
def test_any_tile_on_hopper(T, warpgroups, block_k):
    tile = GpuTile(block_m=16, warpgroups=warpgroups, block_k=block_k, stages=2)
    same("mosaic_gpu", T, 128, 256, tile, simulators.gpu(), layers=2)


def test_what_is_refused():
    with pytest.raises(UnsupportedError, match="K=96"):
        same("mosaic_tpu", 8, 128, 96)
    with pytest.raises(UnsupportedError, match="N=100"):
        same("mosaic_gpu", 8, 100, 128)
    for N, K in ((192, 256), (128, 384)):  # a block more would be needed than the grid has
        with pytest.raises(UnsupportedError, match=f"{K=} is no multiple of 256, or {N=} of 128"):
            same("mosaic_gpu", 8, N, K, GpuTile(block_m=8, warpgroups=2, block_k=256))
    x, one, w = jnp.zeros((4, 128), jnp.int8), jnp.ones(4), jnp.zeros((4, 128), jnp.int8)
    run = int8_matmul.reference
    with pytest.raises(ValueError, match=r"w is \(4, 128\).*\[L, N, K\]"):
        run(x, one, w, one, layer=0)
    with pytest.raises(ValueError, match="x_scale is float32"):
        run(x, one[:3], w, one)
    with pytest.raises(ValueError, match="w is float32"):
        run(x, one, w.astype(jnp.float32), one)
    with pytest.raises(ValueError, match="activation"):
        run(x, one, w, one, up=w, up_scale=one)
    with pytest.raises(ValueError, match="gelu_tanh"):
        run(x, one, w, one, up=w, up_scale=one, activation="relu")
