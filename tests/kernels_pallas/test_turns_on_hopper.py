"""Warpgroups that take blocks of keys in turn on Hopper, those that need a mask first."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from kernels_pallas.hopper import registers
from kernels_pallas.op import UnsupportedError
from kernels_pallas.paged_attention import mosaic_gpu, mosaic_gpu_tiling, reference
from kernels_pallas.paged_attention.cases import batch as step_of
from kernels_pallas.paged_attention.cases import pages_of
from kernels_pallas.paged_attention.ops import page_attention
from tests.kernels_pallas.simulating import on_hopper
from tests.sparing import sparing

LENS, Z, H = (300, 70, 522), 32, 64  # five blocks of 64 keys, two and nine


def stored(kind, step, pages):
    """Pages whose slots that nobody has written hold NaN, in rows of floats or in their scales."""
    held = np.zeros((pages, Z), bool)
    for r, length in enumerate(step.kv_lens):
        at = np.arange(length)
        held[step.tables[r, at // Z], at % Z] = True
    if kind == "bfloat16":
        rows = jax.random.normal(jax.random.key(0), (2, 1, pages, 1, Z, H), jnp.bfloat16)
        junk = jnp.array([1e4, jnp.nan], rows.dtype)[:, None, None, None, None, None]
        return tuple(jnp.where(held[None, None, :, None, :, None], rows, junk))
    both = [pages_of(kind, jax.random.key(i), (1, pages, 1, Z, H)) for i in range(2)]
    if kind == "static":
        return tuple(both)
    scales = (jnp.where(held[None, :, None], x.scale, jnp.nan) for x in both)
    return tuple(
        x.__class__(x.values, scale, x.parts) for x, scale in zip(both, scales, strict=True)
    )


TILES = {  # of blocks of keys, or at the matrix unit
    "turns": {"turns": 2},
    "turns of 128": {"turns": 2, "keys": 128},
    "one of 192": {"turns": 1, "keys": 192},
    "rows": {"tiles": 2},
    "rows of 128": {"tiles": 2, "keys": 128},
}
SIMULATED = [
    *itertools.product(["turns"], ["bfloat16", "int8", "static", "int4"], [0, 150]),
    *itertools.product(["turns of 128", "rows of 128"], ["int8", "int4"], [150]),
    ("one of 192", "int4", 150),
    ("rows", "bfloat16", 150),
]


@pytest.mark.slow
@pytest.mark.parametrize(("tile", "kind", "window"), SIMULATED)
def test_turns_add_up_to_attention(tile, kind, window):
    """With a window, blocks at both ends of a row need a mask, and some lie between."""
    new = (1, 2, 1) if "turns" in TILES[tile] else (1, 20, 1)
    step, pages = step_of(new, LENS, Z)
    q = jax.random.normal(jax.random.key(2), (sum(new), 4, H), jnp.bfloat16)
    args = (q, *stored(kind, step, pages), 0, jax.tree.map(jnp.asarray, step))
    options = {"scale": 0.1, "window": jnp.int32(window), "sinks": jnp.full((4,), 0.5)}
    tile = mosaic_gpu.GpuTile(**TILES[tile], splits=1)
    found = on_hopper(partial(mosaic_gpu.page_attention, *args, **options, tile=tile))
    for x, y in zip(found, reference.page_attention(*args, **options), strict=True):
        np.testing.assert_allclose(x, y, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("prompts", "M", "turns"), [(False, 8, 2), (False, 4, 1), (True, 8, 1)])
def test_decode_steps_are_attended_in_turns(prompts, M, turns):
    """Where a sequence may have blocks enough; two tiles of rows of a prompt share blocks."""
    step, _ = step_of((40 if prompts else 1, 1), (M * Z, 1), Z)
    q = jax.ShapeDtypeStruct((int(step.row_starts[-1]), 4, H), jnp.bfloat16)
    pages = jax.ShapeDtypeStruct((1, 2 * M + 1, 1, Z, H), jnp.bfloat16)
    shape = _shape(mosaic_gpu.GpuTile(), q, pages, pages, step, H)
    assert (shape.turns, shape.ping_pong) == (turns, prompts)
    assert shape.stages % turns == 0  # or a warpgroup would miss what becomes of its slots


WIDE = {  # lanes of keys and of values, tile, turns
    "more keys at a time": (128, 128, {"keys": 128}, 2),
    "as many as there is room for": (128, 128, {"keys": 256}, 1),
    "wide keys": (448, 128, {}, 1),
    "as wide as two turns have room for": (256, 128, {}, 2),
}


@pytest.mark.parametrize("name", WIDE)
def test_turns_share_no_slot(name):
    """Where shared memory holds one block, all warpgroups that compute would wait for its slot."""
    lanes, values, tile, turns = WIDE[name]
    shape = _shape_of_rounded(lanes, values, mosaic_gpu.GpuTile(**tile))
    assert shape.turns == turns
    assert not any(
        n % turns for n in (shape.stages, shape.raw_stages, shape.stages + shape.raw_stages)
    )


def test_turns_that_were_asked_for_must_have_room():
    with pytest.raises(UnsupportedError, match=r"2 \+ 2 in eight bits of blocks of 64 keys of 448"):
        _shape_of_rounded(448, 128, mosaic_gpu.GpuTile(turns=2))


def _shape_of_rounded(lanes, values, tile):
    step, pages = step_of((1, 1), (4096, 1), 128)
    q = jax.ShapeDtypeStruct((2, 8, lanes), jnp.bfloat16)
    k, v = (jax.eval_shape(lambda n=n: pages_of("int8", jax.random.key(0), (1, pages, 2, 128, n)))
            for n in (lanes, values))  # fmt: skip
    return _shape(tile, q, k, v, step, values)


def _shape(tile, q, k, v, step, value_dim):
    rest = {"mass": False, "scale": 0.1, "soft_cap": 0.0}
    return mosaic_gpu_tiling.shape_of(tile, q, k, v, step, value_dim=value_dim, **rest)


SHIPPED = [case for case in page_attention.cases if case.shipped]


@pytest.mark.parametrize("case", SHIPPED, ids=lambda case: case.name)
def test_warpgroups_ask_for_no_more_registers_than_there_are(case):
    """Or the last one to ask waits for ever, which neither a simulator nor a compiler finds."""
    args, arrays = jax.eval_shape(case.make, jax.random.key(0))
    traced = jax.make_jaxpr(
        lambda args, arrays: page_attention.run("mosaic_gpu", *args, **arrays, **case.options)
    )(args, arrays)
    [kernel] = [eqn for eqn in _equations(traced.jaxpr) if eqn.primitive.name == "mpmd_map"]
    [mesh], [body] = kernel.params["meshes"], kernel.params["jaxprs"]
    asked = [_registers(eqn) for eqn in _equations(body) if eqn.primitive.name == "cond"]
    asked = max(asked, key=sum)  # of the branches to which warpgroups go
    assert (0 in asked) == (mesh.num_threads == 2)
    first = mesh.num_threads - len(asked) + 1  # warpgroups that share one
    assert sum(asked[1:]) + first * asked[0] <= registers(mesh.num_threads)


def _registers(cond):
    """What each branch asks for: of jax 0.10 it is an operand."""
    return [
        sum(
            eqn.params["n"] if "n" in eqn.params else int(eqn.invars[0].val)
            for eqn in branch.eqns
            if "set_max_registers" in eqn.primitive.name
        )
        for branch in cond.params["branches"]
    ]


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from _equations(inner)


@pytest.mark.parametrize(
    ("kind", "new", "M", "keys"),
    [("int4", 1, 16, 128), ("int4", 1, 8, 64), ("int4", 300, 16, 64), ("int8", 1, 16, 128),
     ("bfloat16", 1, 16, 64), ("bfloat16", 300, 8, 128)],
)  # fmt: skip
def test_blocks_are_as_large_as_two_have_room(kind, new, M, keys):
    """What a block costs beside its keys is shared by more of them."""
    step, _ = step_of((new, 1), (M * 128, 1), 128)
    q = jax.ShapeDtypeStruct((new + 1, 4, 128), jnp.bfloat16)
    pages = jax.ShapeDtypeStruct((1, 2 * M + 1, 1, 128, 128), jnp.bfloat16)
    if kind != "bfloat16":
        pages = jax.eval_shape(lambda: pages_of(kind, jax.random.key(0), pages.shape))
    shape = _shape(mosaic_gpu.GpuTile(), q, pages, pages, step, 128)
    assert shape.keys_per_block == keys and shape.stages > 1
    assert shape.turns == (1 if new > 1 else 2)


def test_turns_are_of_one_tile_of_rows():
    step, _ = step_of((1, 1), (200, 1), Z)
    q = jax.ShapeDtypeStruct((2, 4, H), jnp.bfloat16)
    pages = jax.ShapeDtypeStruct((1, 15, 1, Z, H), jnp.bfloat16)
    tile = mosaic_gpu.GpuTile(tiles=2, turns=2)
    with pytest.raises(
        UnsupportedError, match=r"tiles=2 of rows, turns=2 .* two warpgroups in all"
    ):
        _shape(tile, q, pages, pages, step, H)


FITTING = {  # kind, heads, lanes, new tokens, keys
    "short, in no turns": ("bfloat16", 32, 128, 1, 128),
    "wide heads": ("bfloat16", 16, 256, 1, 4096),
    "wide heads of a prompt": ("bfloat16", 16, 256, 512, 4096),
    "narrow heads": ("bfloat16", 32, 64, 1, 4096),
    "a prompt": ("bfloat16", 32, 128, 512, 4096),
    "short, of eight bits": ("int8", 32, 128, 1, 128),
    "eight bits": ("int8", 32, 128, 1, 4096),
    "a prompt of eight bits": ("int8", 32, 128, 512, 4096),
    "four bits": ("int4", 32, 128, 1, 4096),
    "wide heads of eight bits": ("int8", 16, 256, 1, 4096),
    "a prompt of four bits": ("int4", 32, 128, 512, 4096),
}


@pytest.mark.parametrize("name", sparing(list(FITTING), "short, in no turns", "a prompt"))
def test_blocks_that_were_counted_fit_in_shared_memory(name):
    """Mosaic adds barriers and room between arrays to what `_with_stages` counts, and refuses
    more."""
    kind, heads, lanes, new, keys = FITTING[name]
    step, pages = step_of((new,) * 2, (keys,) * 2, 128)
    q = jax.ShapeDtypeStruct((2 * new, heads, lanes), jnp.bfloat16)
    shape = (1, pages, 8, 128, lanes)
    stack = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    if kind != "bfloat16":
        stack = jax.eval_shape(lambda: pages_of(kind, jax.random.key(0), shape))
    step = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), step)
    exported = jax.export.export(
        jax.jit(lambda q, k, v, step: mosaic_gpu.page_attention(q, k, v, 0, step, scale=0.1)),
        platforms=["cuda"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")],
    )(q, stack, stack, step)
    assert "mosaic_gpu" in exported.mlir_module()
