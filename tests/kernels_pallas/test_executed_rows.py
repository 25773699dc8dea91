"""Hopper's kernels that take rows without a product, executed as their PTX: `hopper`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.rms_norm_quantize import rms_norm_quantize
from kernels_pallas.sample import sample
from kernels_pallas.sample_gpu import GpuTile
from tests.kernels_pallas.executing import agree, case_of, executing
from tests.kernels_pallas.test_sample import check_all_kinds
from tests.sparing import sparing

pytestmark = [pytest.mark.aot, pytest.mark.usefixtures("no_compilation_cache")]


def executed(op, *args, tile=None, **options):
    with executing() as findings:
        found = op.bodies["mosaic_gpu"].run(*args, **options, tile=tile)
    assert not findings
    return found


NORMED = [case.name for case in rms_norm_quantize.cases if not case.shipped]


@pytest.mark.parametrize("name", sparing(NORMED, "64x384-bfloat16"))
def test_rows_are_normed_and_rounded(name):
    args, arrays, options = case_of(rms_norm_quantize, name)
    tolerance = next(case.tolerance for case in rms_norm_quantize.cases if case.name == name)
    expected = rms_norm_quantize.reference(*args, **arrays, **options)
    agree(executed(rms_norm_quantize, *args, **options), expected, tolerance)


WIDTHS = [(128, jnp.float32), (640, jnp.bfloat16), (4096, jnp.bfloat16), (16384, jnp.bfloat16),
          (16384, jnp.float32)]  # fmt: skip


@pytest.mark.parametrize(("D", "dtype"), sparing(WIDTHS, (640, jnp.bfloat16)))
def test_rows_of_any_width_each_by_itself(D, dtype):
    """One is zero, one huge, one tiny, and one has a number that is none: so is its scale."""
    a, b = jax.random.split(jax.random.key(0))
    x = jax.random.normal(a, (6, D), jnp.float32)
    x = (x * jnp.asarray([1, 0, 1e15, 1e-3, 1, 1])[:, None]).astype(dtype).at[4, D - 1].set(jnp.nan)
    args, options = (x, jax.random.normal(b, (D,), dtype)), {"eps": 1e-6, "offset": 1.0}
    values, scales = executed(rms_norm_quantize, *args, **options)
    expected = rms_norm_quantize.reference(*args, **options)
    real = np.asarray([0, 1, 2, 3, 5])
    assert not np.isfinite(scales[4])  # NaN; XLA's own maximum on a CPU may be -inf then
    agree(scales[real], expected[1][real], 1e-6)
    off = np.abs(np.asarray(values, int)[real] - np.asarray(expected[0], int)[real])
    assert off.max() <= 1 and (off > 0).mean() < 0.001  # halves that a sum's order decides


SAMPLED = [case.name for case in sample.cases if not case.shipped]


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLED)
def test_tokens_are_drawn(name):
    args, _, _ = case_of(sample, name)
    np.testing.assert_array_equal(executed(sample, *args), sample.reference(*args))


SIZES = [(128, 2048), (900, 2048), (2048, 1024), (2052, 1024), (5000, 4096), (8196, 2048)]


@pytest.mark.parametrize(("V", "width"), sparing(SIZES, (900, 2048)))
def test_rows_of_all_kinds_are_drawn_from(V, width):
    """A vocabulary of one part, of whole parts, and of a last one that overlaps."""
    check_all_kinds(V, partial(executed, sample, tile=GpuTile(width)))
