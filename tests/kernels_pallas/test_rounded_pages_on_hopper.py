"""Hopper's kernels on rounded pages: wide latents, and what they refuse. Others are cases."""

import itertools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.op import UnsupportedError
from kernels_pallas.paged_attention import Ragged, mosaic_gpu, reference
from kernels_pallas.paged_attention import mosaic_gpu_int8_writing as int8_writing
from kernels_pallas.paged_attention.cases import batch as step_of
from kernels_pallas.paged_attention.cases import pages_of
from kernels_pallas.paged_attention.codec import empty
from kernels_pallas.paged_attention.ops import page_attention, page_write
from tests.kernels_pallas.simulating import on_hopper


def abstract_step() -> Ragged:
    int32 = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    return Ragged(int32((4,)), int32((3,)), int32((3, 2)), int32(()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "static", "int4"])
def test_wide_rounded_latents_on_hopper(kind):
    """Shares of keys, a window, and scales that are NaN where nobody has written."""
    step, pages = step_of((1, 2), (90, 40), 32)
    stored = pages_of(kind, jax.random.key(0), (1, pages, 1, 32, 448), (384, 64))
    if kind != "static":
        held = np.zeros((pages, 32), bool)
        for r, length in enumerate(step.kv_lens):
            at = np.arange(length)
            held[step.tables[r, at // 32], at % 32] = True
        scale = jnp.where(held[None, :, None], stored.scale, jnp.nan)
        stored = replace(stored, scale=scale)
    q = jax.random.normal(jax.random.key(1), (3, 8, 448), jnp.bfloat16)
    args = (q, stored, None, 0, jax.tree.map(jnp.asarray, step))
    options = {"scale": 0.05, "window": jnp.int32(70), "value_dim": 384}
    tile = mosaic_gpu.GpuTile(splits=2)
    found = on_hopper(partial(mosaic_gpu.page_attention, *args, **options, tile=tile))
    for x, y in zip(found, reference.page_attention(*args, **options), strict=True):
        np.testing.assert_allclose(x, y, rtol=0.02, atol=0.02 * float(jnp.abs(y).max()))


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 3])
def test_a_byte_of_two_blocks_of_threads_is_written_once(first):
    """Slots 62 and 63 share a byte, and their tokens are in two blocks; behind three keys no byte's
    are, but the first one keeps half of what it was."""
    step, pages = step_of((70, 1), (70 + first, 8), 32)
    stored = pages_of("int4", jax.random.key(0), (1, pages, 1, 32, 64))
    k = jax.random.normal(jax.random.key(1), (71, 1, 50), jnp.bfloat16)
    args = (stored, None, k, None, 0, jax.tree.map(jnp.asarray, step))
    found = on_hopper(partial(page_write.run, "mosaic_gpu", *args))
    expected = reference.page_write(*args)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)


REFUSED_ROUNDED_ON_HOPPER = {
    "small pages": ({"Z": 16}, "Z=16 scales of a page of int8: whole 32s"),
    "small pages of four bits": ({"Z": 16, "dtype": jnp.int4}, "Z=16 scales of a page of int4"),
    "narrow parts": ({"parts": (96, 32)}, r"parts=\(96, 32\) of keys, .* whole 64s"),
}


@pytest.mark.parametrize("name", REFUSED_ROUNDED_ON_HOPPER)
def test_it_says_what_rounded_pages_it_cannot_take_on_hopper(name):
    changed, message = REFUSED_ROUNDED_ON_HOPPER[name]
    sizes = {"dtype": jnp.int8, "Z": 64, "parts": None} | changed
    shape = (1, 4, 2, sizes["Z"], 128)
    pages = jax.eval_shape(lambda: empty(sizes["dtype"], shape, parts=sizes["parts"]))
    q = jax.ShapeDtypeStruct((3, 4, 128), jnp.bfloat16)
    step = abstract_step()

    def run(q, pages, step):
        return page_attention.run("mosaic_gpu", q, pages, pages, 0, step, scale=1.0)

    with pytest.raises(UnsupportedError, match=message):
        jax.eval_shape(run, q, pages, step)


@pytest.mark.parametrize("parts", [(256,), (512, 64), (64, 128), (64, 64, 192)])
def test_registers_hold_lanes_of_one_line(parts):
    """Copies mix up the words of a line of 128 bytes by where it lies, which stores to a part of a
    wider row would not know of. Simulators do not either."""
    begins = itertools.accumulate((0, *parts[:-1]))
    pieces = [int8_writing._slices(*x) for x in zip(begins, parts, strict=True)]
    pieces = list(itertools.chain(*pieces))
    held = [lane for x in pieces for lane in range(x.start, x.start + x.size)]
    assert held == list(range(sum(parts)))
    for piece in pieces:
        line, _, lanes = int8_writing._line(piece)
        assert line * 128 + lanes.start == piece.start and lanes.start + lanes.size <= 128


ROUNDED_WRITES_REFUSED_ON_HOPPER = {
    "narrow": (jnp.int8, 96, r"lanes=\(96, 96\) of pages .* whole 64s"),
    "wide": (jnp.int8, 1024, r"64 rows of lanes=\(1024, 1024\) need 655360 bytes of shared memory"),
    "narrow, four bits": (jnp.int4, 96, r"lanes=\(96, 96\) of pages .* whole 64s"),
    "wide, four bits": (jnp.int4, 1024, r"64 rows of lanes=\(1024, 1024\) need 278528 bytes"),
}


@pytest.mark.parametrize("name", ROUNDED_WRITES_REFUSED_ON_HOPPER)
def test_writing_says_what_rounded_pages_it_cannot_take_on_hopper(name):
    dtype, lanes, message = ROUNDED_WRITES_REFUSED_ON_HOPPER[name]
    pages = jax.eval_shape(lambda: empty(dtype, (1, 4, 2, 64, lanes)))
    k = jax.ShapeDtypeStruct((3, 2, lanes), jnp.float32)
    step = abstract_step()
    with pytest.raises(UnsupportedError, match=message):
        jax.eval_shape(lambda *a: page_write.run("mosaic_gpu", *a[:4], 0, a[4]),
                       pages, pages, k, k, step)  # fmt: skip
