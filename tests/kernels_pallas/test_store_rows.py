"""Rows of sums that Hopper's kernels store, and those that they leave as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.hopper import ROWS, WARP_ROWS, store_rows
from tests.kernels_pallas import simulators
from tests.kernels_pallas.executing import executing

COLUMNS = 32
ENDS = np.array([1, 16, 17, 48, 64, 0], np.int32)
X = np.random.default_rng(0).normal(size=(ROWS, COLUMNS)).astype(np.float32)


def stored(interpret=False):
    """For each of `ENDS`, the rows that a block of threads has stored, and half as many columns
    beside them."""

    def kernel(ends, given, out, x_smem, arrived):
        number = lax.axis_index("item")
        plgpu.copy_gmem_to_smem(given, x_smem, arrived)
        plgpu.barrier_wait(arrived)
        x = plgpu.layout_cast(x_smem[...], plgpu.Layout.WGMMA)
        rows, half = pl.ds(number * ROWS, ROWS), COLUMNS // 2
        pairs = [(out.at[rows, pl.ds(0, COLUMNS)], x)]
        pairs.append((out.at[rows, pl.ds(COLUMNS, half)], x[:, half:]))
        store_rows(pairs, ends[number], simulated=bool(interpret))

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((len(ENDS) * ROWS, COLUMNS + COLUMNS // 2), jnp.float32),
        grid=(len(ENDS),),
        grid_names=("item",),
        scratch_types=[plgpu.SMEM(X.shape, jnp.float32), plgpu.Barrier()],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
        kernel_name="stored",
    )(jnp.asarray(ENDS), jnp.asarray(X))


def check(found):
    """What nobody has written is NaN."""
    wide = np.concatenate([X, X[:, COLUMNS // 2 :]], 1)
    for rows, end in zip(np.split(np.asarray(found), len(ENDS)), ENDS, strict=True):
        written = -(-end // WARP_ROWS) * WARP_ROWS
        np.testing.assert_array_equal(rows[:written], wide[:written])
        assert np.isnan(rows[written:]).all()


def test_the_simulator_stores_those_that_are_wanted():
    found = stored(interpret=simulators.gpu())
    check(found)
    assert not np.isnan(np.asarray(found)[:WARP_ROWS]).any()


@pytest.mark.aot
@pytest.mark.usefixtures("no_compilation_cache")
def test_warps_store_those_that_are_wanted():
    with executing() as findings:
        found = stored()
    check(found)
    assert not findings
