"""Hopper's kernels over pages, executed as the PTX that they are compiled to: `hopper`."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.paged_attention import mosaic_gpu, mosaic_gpu_writing, reference
from kernels_pallas.paged_attention.cases import batch as step_of
from kernels_pallas.paged_attention.coded_cases import pages_of
from kernels_pallas.paged_attention.ops import page_attention, page_write
from tests.kernels_pallas import test_turns_on_hopper as turns
from tests.kernels_pallas.executing import executing
from tests.kernels_pallas.hopper.memory import UNWRITTEN
from tests.kernels_pallas.hopper.ptx import Immediate

pytestmark = [pytest.mark.aot, pytest.mark.usefixtures("no_compilation_cache")]

SLOW = pytest.mark.slow


def case_of(op, name):
    case = next(case for case in op.cases if case.name == name)
    return *case.make(jax.random.key(3)), case.options


def written(args, **how):
    with executing(**how) as findings:
        found = mosaic_gpu_writing.page_write(*args)
    return found, findings


def check_written(args):
    """To the bit. Rows of four bits are packed with what lies before them, wanted or not."""
    found, findings = written(args)
    rounded = args[0].values.dtype if hasattr(args[0], "values") else None
    assert set(findings) <= ({UNWRITTEN} if rounded == jnp.uint8 else set())
    for x, y in zip(
        jax.tree.leaves(found), jax.tree.leaves(reference.page_write(*args)), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


QUICKLY = ["int8", "int8-latent", "int4"]
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


def check_attended(args, arrays, options, tile=None, tolerance=0.01, allowed=()):
    found, findings = attended(args, arrays, options, tile)
    assert set(findings) <= set(allowed)
    tokens = int(args[-1].row_starts[int(args[-1].num_seqs)])
    for x, y in zip(found, reference.page_attention(*args, **arrays, **options), strict=True):
        x, y = (np.asarray(each, np.float32)[:tokens] for each in (x, y))
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * float(np.abs(y).max()))


ATTENDED = [case.name for case in page_attention.cases
            if not case.shipped and "mosaic_gpu" in (case.bodies or ["mosaic_gpu"])]  # fmt: skip


@pytest.mark.parametrize("name", some(ATTENDED, ["window-64", "int8-windowed"]))
def test_attention_over_pages(name):
    # It reads scales that no copy has brought, on which nothing that comes out depends.
    allowed = [UNWRITTEN] if name == "int4-latent" else []
    check_attended(*case_of(page_attention, name), allowed=allowed)


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


# What the executor finds of kernels that were spoilt.


def edited(opcode, change):
    """Changes instructions whose opcode begins so; there are some."""

    def changed(kernel):
        there = kernel.program.instructions
        assert any(x.opcode.startswith(opcode) for x in there)
        spoilt = (change(x) if x.opcode.startswith(opcode) else x for x in there)
        return replace(kernel, program=replace(kernel.program, instructions=tuple(spoilt)))

    return changed


def without(opcode):
    return edited(opcode, lambda x: replace(x, parts=("prefetch",)))


def test_registers_that_there_are_not_are_waited_for_for_ever():
    greedy = edited("setmaxnreg.inc", lambda x: replace(x, operands=(Immediate(256),)))
    _, findings = attended(*case_of(page_attention, "window-64"), changed=greedy)
    assert all("deadlock, warpgroup " in text and "for 256 registers" in text for text in findings)
    assert findings


SPOILT = {  # what is left out, and what is found then
    "a fence": ("fence.proxy.async", "reads stores without a fence.proxy.async"),
    "a wait for copies": ("cp.async.bulk.wait_group", "ends before its copies were waited for"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_it_finds_what_was_left_out_of_writing(name):
    opcode, expected = SPOILT[name]
    args, _, _ = case_of(page_write, "int8")
    _, findings = written(args, changed=without(opcode))
    assert any(expected in text for text in findings)


LEFT_OUT_OF_ATTENTION = {
    "a wait for products": ("wgmma.wait_group", "registers of a wgmma are touched before"),
    "an expectation": ("mbarrier.arrive.expect_tx", "deadlock"),
}


@pytest.mark.parametrize("name", LEFT_OUT_OF_ATTENTION)
def test_it_finds_what_was_left_out_of_attention(name):
    opcode, expected = LEFT_OUT_OF_ATTENTION[name]
    _, findings = attended(*case_of(page_attention, "window-64"), changed=without(opcode))
    assert any(expected in text for text in findings)


def test_another_swizzle_writes_elsewhere():
    """As rows in registers do whose lines lie elsewhere than their copies believe."""

    def changed(kernel):
        tensors = (replace(x, descriptor=replace(x.descriptor, swizzle=16))
                   for x in kernel.launch.tensors)  # fmt: skip
        return replace(kernel, launch=replace(kernel.launch, tensors=tuple(tensors)))

    args, _, _ = case_of(page_write, "int8")
    found, _ = written(args, changed=changed)
    expected = jax.jit(reference.page_write)(*args)
    assert (np.asarray(found[0].values) != np.asarray(expected[0].values)).any()


def test_copies_that_leave_their_arrays_stop_it():
    def changed(kernel):
        [first, *others] = kernel.launch.tensors
        sizes = (first.descriptor.sizes[0] + 1000, *first.descriptor.sizes[1:])
        descriptor = replace(first.descriptor, sizes=sizes)
        first = replace(first, array=1, descriptor=descriptor)  # smaller
        return replace(kernel, launch=replace(kernel.launch, tensors=(first, *others)))

    args, _, _ = case_of(page_write, "int8")
    _, findings = written(args, changed=changed)
    assert any("of global memory leaves arrays" in text for text in findings)
