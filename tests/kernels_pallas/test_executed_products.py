"""Hopper's products of eight-bit integers and of groups, executed as their PTX: `hopper`."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.grouped_matmul import mosaic_gpu as grouped
from kernels_pallas.int8_matmul import int8_matmul
from kernels_pallas.int8_matmul import mosaic_gpu as int8
from kernels_pallas.int8_matmul.cases import case
from tests.kernels_pallas.executing import agree, case_of, executing
from tests.kernels_pallas.hopper.block import SCHEDULES
from tests.kernels_pallas.hopper.memory import UNWRITTEN
from tests.sparing import sparing

pytestmark = [pytest.mark.aot, pytest.mark.usefixtures("no_compilation_cache")]


def executed(op, args, arrays, options, tile=None, allowed=(), **how):
    with executing(**how) as findings:
        found = op.bodies["mosaic_gpu"].run(*args, **arrays, **options, tile=tile)
    assert set(findings) <= set(allowed)
    return found


def check(op, name, **how):
    args, arrays, options = made = case_of(op, name)
    expected = op.reference(*args, **arrays, **options)
    agree(executed(op, *made, **how), expected, op.case(name).tolerance)


INT8 = [case.name for case in int8_matmul.cases if not case.shipped]


@pytest.mark.parametrize("name", sparing(INT8, "256x128x256-gelu_tanh-bfloat16"))
def test_products_of_eight_bits(name):
    check(int8_matmul, name)


BUSY = {  # two warpgroups and one that loads, or one that does everything
    "256x128x256-gelu_tanh-bfloat16": int8_matmul, "48x384x256-float32": int8_matmul,
    "100x3x128x128-pad90-bfloat16-float32": grouped_matmul,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", BUSY)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_whenever_copies_happen(name, schedule, seed):
    check(BUSY[name], name, schedule=schedule, seed=100 * seed)


def sums(T, N, K, tile, **options):
    """What a kernel and its reference make of scales that are powers of two, so that whatever is
    not summed exactly is seen."""
    args, arrays = case(T, N, K, out_dtype=jnp.float32, **options).make(jax.random.key(1))
    powers = lambda x: jnp.exp2(jnp.round(jnp.log2(x)))  # noqa: E731
    x, x_scale, w, w_scale = args
    args, told = (x, powers(x_scale + 2**-9), w, powers(w_scale)), {"out_dtype": jnp.float32}
    found = executed(int8_matmul, args, arrays, told, tile)
    return found, int8_matmul.reference(*args, **arrays, **told)


SHARED = 220 * 1024  # bytes of shared memory that tiles may take


def tiles(gated):
    """What tuning may try, but that stages take turns, and are no more than there is room for."""
    stages = itertools.cycle((3, 4, 6))
    for block_m, count, block_k in itertools.product((8, 64, 128, 256), (1, 2), (128, 256)):
        room = SHARED - count * 64 * 64 * 4
        fits = room // (block_k * (64 * count * (1 + gated) + block_m))
        if fits > 1:
            yield int8.Tile(block_m, count, block_k, min(next(stages), fits))


INT8_TILES = list(tiles(gated=False))


@pytest.mark.parametrize("tile", sparing(INT8_TILES, INT8_TILES[0]), ids=str)
def test_sums_of_eight_bits_are_exact_in_any_tile(tile):
    """Rows that do not fill a tile; steps fewer than stages, as many, and more."""
    np.testing.assert_array_equal(*sums(tile.block_m + tile.block_m // 2 - 3, 256, 768, tile))


@pytest.mark.slow
@pytest.mark.parametrize("tile", list(tiles(gated=True)), ids=str)
@pytest.mark.parametrize("activation", ["silu", "swiglu_oai"])
def test_gates_in_any_tile(tile, activation):
    one = case(tile.block_m + 5, 128, 512, layers=2, activation=activation, out_dtype=jnp.float32)
    args, arrays = one.make(jax.random.key(2))
    found = executed(int8_matmul, args, arrays, one.options, tile)
    expected = np.asarray(int8_matmul.reference(*args, **arrays, **one.options))
    largest = float(np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * largest)


@pytest.mark.slow
@pytest.mark.parametrize("T", [1, 7, 9, 63, 65, 255, 257])
def test_any_number_of_rows(T):
    np.testing.assert_array_equal(*sums(T, 192, 256, None))


GROUPED = [case.name for case in grouped_matmul.cases if not case.shipped]
WIDE = "100x3x128x128-pad90-bfloat16-float32"  # its tile fills what is transposed at a time


@pytest.mark.slow
@pytest.mark.parametrize("name", GROUPED)
def test_products_of_groups(name):
    """Of a tile narrower than what is transposed at a time, all is read, and less stored."""
    check(grouped_matmul, name, allowed=[] if name == WIDE else [UNWRITTEN])


def groups(sizes, rows, N, K, dtype, out_dtype):
    """Operands: experts without rows are NaN, or have NaN for scales, and so has padding."""
    a, b, c, d = jax.random.split(jax.random.key(4), 4)
    E, told = len(sizes), {"out_dtype": out_dtype}
    absent, padding = np.flatnonzero(np.asarray(sizes) == 0), sum(sizes)
    if dtype == jnp.bfloat16:
        x = jax.random.normal(a, (rows, K), dtype).at[padding:].set(jnp.nan)
        w = (jax.random.normal(b, (E, N, K), dtype) * K**-0.5).at[absent].set(jnp.nan)
    else:
        x, w = (jax.random.randint(k, s, -127, 128, jnp.int8)
                for k, s in ((a, (rows, K)), (b, (E, N, K))))  # fmt: skip
        scale = jax.random.uniform(c, (rows,)).at[padding:].set(jnp.nan)
        told["x_scale"] = scale
        told["w_scale"] = jax.random.uniform(d, (E, N)).at[absent].set(jnp.nan)
    return (x, w, jnp.asarray(sizes, jnp.int32)), told


def check_groups(sizes, rows, tile, dtype, out_dtype=jnp.float32, N=256, K=512):
    args, told = groups(sizes, rows, N, K, dtype, out_dtype)
    # of a tile narrower than what is transposed at a time all is read, and less stored
    allowed = [UNWRITTEN] if tile.block_m < 64 else []
    found = executed(grouped_matmul, args, {}, told, tile, allowed)
    args = jax.tree.map(jnp.nan_to_num, args)  # what is absent is nobody's
    told = jax.tree.map(jnp.nan_to_num, {k: v for k, v in told.items() if k != "out_dtype"})
    expected = grouped_matmul.reference(*args, **told, out_dtype=out_dtype)
    agree(found, expected, 1e-5 if out_dtype == jnp.float32 else 0.004)


def grouped_tiles():
    """What tuning may try, but that stages take turns, and are no more than there is room for."""
    stages = itertools.cycle((3, 4))
    sizes = itertools.product((16, 32, 64, 128), (1, 2), (64, 128), (128, 256))
    for block_m, count, rows, width in sizes:
        room = SHARED - count * rows * 64 * 4 * 2  # float32 rows, transposed and plain
        fits = room // (width * (count * rows + block_m))
        if fits > 1:
            held = min(next(stages), fits)
            yield grouped.Tile(block_m, count, rows, width // 2, held), jnp.bfloat16
            yield grouped.Tile(block_m, count, rows, width, held), jnp.int8


@pytest.mark.slow
@pytest.mark.parametrize(("tile", "dtype"), list(grouped_tiles()), ids=str)
def test_groups_in_any_tile(tile, dtype):
    """Groups that end within a tile, take several or have no rows, and padding behind them."""
    check_groups([3, 0, 150, 20, 0], 179, tile, dtype)


ONE, TWO = grouped.Tile(64, 1, 64, 128, 2), grouped.Tile(128, 2, 64, 64, 3)


@pytest.mark.parametrize(("tile", "dtype"), [(TWO, jnp.bfloat16), (ONE, jnp.int8)],
                         ids=["bfloat16", "int8"])  # fmt: skip
def test_groups_end_anywhere(tile, dtype):
    """The last one has no rows: the padding behind it takes nothing of its weights or scales."""
    check_groups([3, 0, 150, 20, 0], 179, tile, dtype, N=128, K=256)


SIZES = {
    "none at all": [0, 0, 0], "one": [70], "the last": [0, 0, 64], "of a row": [1] * 9,
    "odd": [5, 0, 40, 0, 0, 19], "by eights": [8, 16, 0, 40],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("out_dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", SIZES)
def test_groups_of_any_size(name, out_dtype):
    check = partial(check_groups, SIZES[name], 72, out_dtype=out_dtype, N=128, K=128)
    check(grouped.Tile(16, 1, 64, 64, 2), jnp.bfloat16)
    check(grouped.Tile(64, 2, 64, 128, 2), jnp.int8)
