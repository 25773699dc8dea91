"""Hopper's kernels that take rows without a product, executed as their PTX: `hopper`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.rms_norm_quantize import rms_norm_quantize
from kernels_pallas.sample import sample
from kernels_pallas.sample_gpu import GpuTile
from tests.kernels_pallas.executing import agree, case_of, executing
from tests.kernels_pallas.test_sample import rows, stretch
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


def all_kinds(V):
    """Both ends, ties, what is not finite, filters alone and together; rows 8 on are plain."""
    rng = np.random.default_rng(0)
    scores, u = rng.normal(size=(16, V)).astype(np.float32) * 3, rng.random(16)
    temperature, top_k, top_p, min_p = np.ones(16), np.zeros(16, int), np.ones(16), np.zeros(16)
    scores[:2] = -np.inf
    scores[:2, [17, V // 2, V - 1]] = 1.0
    u[:2] = 0.0, np.nextafter(np.float32(1), 0)
    scores[2:6], scores[2:6, V - 50 :] = 0.0, 2.0
    top_k[2:6], u[2:6] = 1, np.arange(4) / 4
    scores[6, 7], scores[7] = np.nan, -np.inf
    top_k[[6, 8, 13, 14]] = 9, 5, 40, 10**6
    top_p[[7, 9, 13, 15]] = 0.9, 0.7, 0.8, 1e-6
    min_p[[10, 13]] = 0.1, 0.02
    temperature[[11, 12, 13]] = 1e-7, 5.0, 1.7
    return scores, u, temperature, top_k, top_p, min_p


SIZES = [(128, 2048), (900, 2048), (2048, 1024), (2052, 1024), (5000, 4096), (8196, 2048)]


@pytest.mark.parametrize(("V", "width"), sparing(SIZES, (900, 2048)))
def test_rows_of_all_kinds_are_drawn_from(V, width):
    """A vocabulary of one part, of whole parts, and of a last one that overlaps."""
    scores, u, *filters = all_kinds(V)
    args = rows(scores, u, *filters)
    tokens = np.asarray(executed(sample, *args, tile=GpuTile(width))).tolist()
    assert tokens[:2] == [17, V - 1]
    assert tokens[2:6] == [V - 50 + 50 * i // 4 for i in range(4)]
    assert min(tokens) >= 0 and max(tokens) < V
    temperature, *others = filters
    for r in range(8, 16):
        options = max(temperature[r], 1e-6), *(x[r] for x in others)
        begin, end = stretch(scores[r], tokens[r], *options)
        assert begin - 2e-5 <= u[r] <= end + 2e-5
