"""Every byte that a page may hold, as Hopper's kernels multiply it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.paged_attention.mosaic_gpu_shape import KEY_CLASSES
from kernels_pallas.paged_attention.mosaic_gpu_widening import UNIT, unpack, widen
from tests.kernels_pallas import simulators
from tests.kernels_pallas.executing import executing

LANES = 128
BYTES = np.random.default_rng(0).permutation(64 * LANES).astype(np.uint8).reshape(64, LANES)


def widened(raw, how, rows, interpret=False):
    def kernel(given, out, raw_smem, block, arrived):
        plgpu.copy_gmem_to_smem(given, raw_smem, arrived)
        plgpu.barrier_wait(arrived)
        how(raw_smem, block, simulated=bool(interpret))
        plgpu.copy_smem_to_gmem(block, out)
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((rows, LANES), jnp.bfloat16),
        scratch_types=[
            plgpu.SMEM(raw.shape, raw.dtype),
            plgpu.SMEM((rows, LANES), jnp.bfloat16),
            plgpu.Barrier(),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
        kernel_name="widened",
    )(raw)


def eights(**how):
    """What eight bits become, and what they should."""
    raw = jnp.asarray(BYTES.view(np.int8))
    return widened(raw, partial(widen, most=64), 64, **how), BYTES.view(np.int8)


def fours(**how):
    """Even bytes' low halves, their high ones, and odd bytes' halves."""
    halves = [half for some in np.split(BYTES, 2) for half in (some & 15, some >> 4)]
    signed = np.concatenate(halves).astype(np.int8)
    signed = np.where(signed > 7, signed - 16, signed)
    return widened(jnp.asarray(BYTES), partial(unpack, classes=KEY_CLASSES), 128, **how), signed


@pytest.mark.parametrize("bits", [eights, fours])
def test_the_simulator_reckons_all_integers(bits):
    found, expected = bits(interpret=simulators.gpu())
    np.testing.assert_array_equal(np.asarray(found, np.float32) / UNIT, expected)


@pytest.mark.aot
@pytest.mark.usefixtures("no_compilation_cache")
@pytest.mark.parametrize("bits", [eights, fours])
def test_instructions_make_all_integers(bits):
    with executing() as findings:
        found, expected = bits()
    assert not findings
    np.testing.assert_array_equal(np.asarray(found, np.float32) / UNIT, expected)
