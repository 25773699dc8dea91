"""Hopper's kernels over pages, executed as the PTX that they are compiled to: `hopper`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.paged_attention import mosaic_gpu, mosaic_gpu_writing, reference
from kernels_pallas.paged_attention.cases import batch as step_of
from kernels_pallas.paged_attention.cases import pages_of
from kernels_pallas.paged_attention.ops import page_attention, page_write
from tests.kernels_pallas import test_turns_on_hopper as turns
from tests.kernels_pallas.executing import case_of, executing
from tests.kernels_pallas.hopper.block import SCHEDULES
from tests.kernels_pallas.hopper.memory import UNWRITTEN

pytestmark = [pytest.mark.aot, pytest.mark.usefixtures("no_compilation_cache")]

SLOW = pytest.mark.slow


def written(args, **how):
    with executing(**how) as findings:
        found = mosaic_gpu_writing.page_write(*args)
    return found, findings


def check_written(args, **how):
    """To the bit. Rows of four bits are packed with what lies before them, wanted or not."""
    found, findings = written(args, **how)
    rounded = args[0].values.dtype if hasattr(args[0], "values") else None
    assert set(findings) <= ({UNWRITTEN} if rounded == jnp.uint8 else set())
    for x, y in zip(
        jax.tree.leaves(found), jax.tree.leaves(reference.page_write(*args)), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


QUICKLY = ["int8-latent", "int4"]
WRITTEN = [case.name for case in page_write.cases if not case.shipped]


def some(names, quickly):
    return [pytest.param(x, marks=[SLOW] * (x not in quickly)) for x in names]


@pytest.mark.parametrize("name", some(WRITTEN, QUICKLY))
def test_rows_are_written_where_they_belong(name):
    """Some of 100, 128, 192 and 288 lanes; slots that begin and end anywhere in a page."""
    args, _, _ = case_of(page_write, name)
    check_written(args)


WIDE = {  # lanes, parts, lanes of new rows
    "int8": (640, (512, 128), 576),
    "static": (384, None, 320),
    "int4": (640, (512, 128), 576),
}


@pytest.mark.parametrize("kind", some(WIDE, ["static"]))
def test_rows_of_several_lines_are_written_where_they_belong(kind):
    """Copies mix up the words of a line of 128 lanes by where it lies, as no simulator does."""
    lanes, parts, size = WIDE[kind]
    step, pages = step_of((1, 70, 9), (40, 90, 9), 32)
    stored = pages_of(kind, jax.random.key(0), (1, pages, 1, 32, lanes), parts)
    k = jax.random.normal(jax.random.key(1), (80, 1, size), jnp.bfloat16)
    check_written((stored, None, k, None, 0, jax.tree.map(jnp.asarray, step)))


def attended(args, arrays, options, tile=None, **how):
    with executing(**how) as findings:
        found = mosaic_gpu.page_attention(*args, **arrays, **options, tile=tile)
    return found, findings


def check_attended(args, arrays, options, tile=None, tolerance=0.01, allowed=(), **how):
    found, findings = attended(args, arrays, options, tile, **how)
    assert set(findings) <= set(allowed)
    tokens = int(args[-1].row_starts[int(args[-1].num_seqs)])
    for x, y in zip(found, reference.page_attention(*args, **arrays, **options), strict=True):
        x, y = (np.asarray(each, np.float32)[:tokens] for each in (x, y))
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * float(np.abs(y).max()))


ATTENDED = [case.name for case in page_attention.cases
            if not case.shipped and "mosaic_gpu" in (case.bodies or ["mosaic_gpu"])]  # fmt: skip


@pytest.mark.parametrize("name", some(ATTENDED, ["window-64", "int8-windowed"]))
def test_attention_over_pages(name):
    # Scales of an odd number of parts are sorted with one more row, which nobody uses.
    allowed = [UNWRITTEN] if name == "int4-latent" else []
    check_attended(*case_of(page_attention, name), allowed=allowed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["window-64", "int8-windowed"])
def test_whenever_copies_happen(name, schedule, seed):
    check_attended(*case_of(page_attention, name), schedule=schedule, seed=100 * seed)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rows_are_written_whenever_copies_happen(schedule):
    args, _, _ = case_of(page_write, "int8")
    check_written(args, schedule=schedule)


@pytest.mark.slow
@pytest.mark.parametrize(("tile", "kind", "window"), turns.SIMULATED)
def test_warpgroups_take_turns(tile, kind, window):
    """What nobody has written is NaN."""
    new = (1, 2, 1) if "turns" in turns.TILES[tile] else (1, 20, 1)
    step, pages = step_of(new, turns.LENS, turns.Z)
    q = jax.random.normal(jax.random.key(2), (sum(new), 4, turns.H), jnp.bfloat16)
    args = (q, *turns.stored(kind, step, pages), 0, jax.tree.map(jnp.asarray, step))
    options = {"scale": 0.1, "window": jnp.int32(window), "sinks": jnp.full((4,), 0.5)}
    tile = mosaic_gpu.GpuTile(**turns.TILES[tile], splits=1)
    check_attended(args, {}, options, tile, 0.02)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "static", "int4"])
def test_two_warpgroups_share_values_of_wide_rounded_latents(kind):
    """Three warpgroups ask for registers that there are."""
    step, pages = step_of((1, 2), (90, 40), 32)
    stored = pages_of(kind, jax.random.key(0), (1, pages, 1, 32, 448), (384, 64))
    q = jax.random.normal(jax.random.key(1), (3, 8, 448), jnp.bfloat16)
    args = (q, stored, None, 0, jax.tree.map(jnp.asarray, step))
    options = {"scale": 0.05, "window": jnp.int32(70), "value_dim": 384}
    check_attended(args, {}, options, mosaic_gpu.GpuTile(splits=2), 0.02)
