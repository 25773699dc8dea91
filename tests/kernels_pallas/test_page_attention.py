"""The kernels that write and attend pages on drawn steps, what they refuse, masses of pages."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from kernels_pallas.op import UnsupportedError
from kernels_pallas.paged_attention import (
    Groups,
    Ragged,
    mosaic_gpu,
    mosaic_gpu_tiling,
    mosaic_gpu_writing,
    mosaic_tpu,
    mosaic_tpu_blocks,
    mosaic_tpu_writing,
    reference,
)
from kernels_pallas.paged_attention.cases import batch as step_of
from kernels_pallas.paged_attention.ops import page_attention, page_write
from kernels_pallas.target import Target
from sharding import compile_only
from tests.kernels_pallas import simulators
from tests.kernels_pallas.simulating import on_hopper
from tests.sparing import sparing

L, LAYER, M, R, T, H = 2, 1, 4, 5, 24, 128

VARIANTS = {
    "one to one": {"N": 2, "K": 2},
    "three to one": {"N": 6, "K": 2, "sinks": True},
    "windowed": {"N": 4, "K": 2, "window": 11},
    "capped": {"N": 4, "K": 1, "soft_cap": 3.0, "window": 1},
    "latent": {"N": 16, "K": 1, "value_dim": 100, "latent": True},
    "short heads": {"N": 4, "K": 2, "H": 64, "value_dim": 80},
    "bfloat16": {"N": 4, "K": 2, "dtype": jnp.bfloat16, "Z": 16},
    "masses": {"N": 4, "K": 2, "mass": True, "window": 20, "sinks": True},
}


@st.composite
def steps(draw, Z=8):
    """Row starts, lengths, tables and count: chunks, decodes, idle rows, padding, shared pages."""
    n = draw(st.integers(0, R))
    starts, lens = [0], []
    tables = np.array(draw(st.permutations(range(R * M))), np.int32).reshape(R, M)
    for r in range(n):
        new = draw(st.integers(0, T - starts[-1]) | st.integers(0, min(1, T - starts[-1])))
        new = min(new, M * Z)
        lens.append(new + draw(st.integers(0, M * Z - new)))
        starts.append(starts[-1] + new)
        if r and draw(st.booleans()):
            tables[r, : (lens[-1] - new) // Z] = tables[r - 1, : (lens[-1] - new) // Z]
    starts += [starts[-1]] * (R - n)
    lens += [0] * (R - n)
    return Ragged(np.array(starts, np.int32), np.array(lens, np.int32), tables, np.int32(n))


@st.composite
def grouped(draw):
    """Steps whose sequences are cut into groups, which may be of one, of none, or share nothing."""
    step = draw(steps())
    cuts = sorted(draw(st.lists(st.integers(0, step.num_seqs), min_size=4, max_size=4)))
    tables, pages = step.tables.copy(), []
    for first, end in itertools.pairwise(cuts):
        pages.append(draw(st.integers(0, M)))
        old = (step.kv_lens - np.diff(step.row_starts))[first:end] // 8
        whole = min(pages[-1], *old, M)  # the kernel finds that out, too
        tables[first:end, :whole] = tables[first : first + 1, :whole]
    groups = Groups(*(np.array(x, np.int32) for x in (cuts[:-1], cuts[1:], pages)))
    return step._replace(tables=tables, groups=groups)


@functools.cache
def both(**options):
    def run(arrays, step, window, sinks):
        q, k_pages, v_pages = arrays
        rest = {"window": window, "sinks": sinks, "scale": 0.2, **options}
        args = (q, k_pages, v_pages, jnp.int32(LAYER), step)
        tile = mosaic_tpu.TpuTile(keys=16, tokens=16)
        found = mosaic_tpu.page_attention(*args, **rest, tile=tile, interpret=True)
        return found, reference.page_attention(*args, **rest)

    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize("variant", sparing(VARIANTS, "three to one", "latent", "masses"))
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=12, deadline=None)
def test_it_is_the_reference(variant, data, seed):
    step = data.draw(steps(VARIANTS[variant].get("Z", 8)))
    found, expected, _ = run_both(step, seed, **VARIANTS[variant])
    tolerance = 0.02 if VARIANTS[variant].get("dtype") else 1e-4
    real = int(step.row_starts[step.num_seqs])
    for x, y in zip(found, expected, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        np.testing.assert_allclose(x[:real], y[:real], rtol=tolerance, atol=tolerance)


@functools.cache
def with_and_without_groups(**options):
    def run(arrays, step, window, sinks):
        attend = functools.partial(
            mosaic_tpu.page_attention, *arrays, jnp.int32(LAYER), window=window, sinks=sinks,
            scale=0.2, tile=mosaic_tpu.TpuTile(keys=16, tokens=16), interpret=True, **options,
        )  # fmt: skip
        return attend(step), attend(step._replace(groups=None))

    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize(
    "variant", sparing(("three to one", "windowed", "latent", "masses"), "three to one", "latent")
)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=12, deadline=None)
def test_no_bit_depends_on_a_group(variant, data, seed):
    step = data.draw(grouped())
    found, alone, _ = run_both(step, seed, run=with_and_without_groups, **VARIANTS[variant])
    real = int(step.row_starts[step.num_seqs])
    for x, y in zip(found, alone, strict=True):
        np.testing.assert_array_equal(x[:real], y[:real])


def test_pages_of_a_group_are_read_once():
    """Pages of all members but the first are NaN: nobody looks at them."""
    tables = np.arange(12, dtype=np.int32).reshape(3, 4)
    pages = np.random.default_rng(0).standard_normal((1, 12, 1, 8, 128)).astype(np.float32)
    pages[:, [4, 5, 8, 9]] = np.nan
    q = jnp.asarray(pages[0, :3, 0, :2], jnp.float32)
    tables_alike = np.concatenate([tables[[0, 0, 0], :2], tables[:, 2:]], 1)
    starts, lens = np.arange(4, dtype=np.int32), np.array([17, 30, 20], np.int32)
    groups = Groups(*(np.array([x], np.int32) for x in (0, 3, 2)))
    step = Ragged(starts, lens, tables, np.int32(3), groups)
    found = mosaic_tpu.page_attention(
        q, jnp.asarray(pages), jnp.asarray(pages), 0, jax.tree.map(jnp.asarray, step), scale=0.1,
        tile=mosaic_tpu.TpuTile(keys=16), interpret=True,
    )  # fmt: skip
    step = jax.tree.map(jnp.asarray, step._replace(tables=tables_alike, groups=None))
    expected = reference.page_attention(q, *[jnp.asarray(pages)] * 2, 0, step, scale=0.1)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def run_both(
    step, seed, *, N, K, H=H, Z=8, dtype=jnp.float32, window=0, sinks=False, latent=False,
    run=both, **options
):  # fmt: skip
    """The kernel and the reference, where what nobody has written yet is NaN."""
    rng = np.random.default_rng(seed)
    written = np.zeros((R * M, Z), bool)
    for r in range(step.num_seqs):
        for at in range(step.kv_lens[r]):
            written[step.tables[r, at // Z], at % Z] = True

    def pages():
        x = rng.standard_normal((L, R * M, K, Z, 128)).astype(np.float32)
        return jnp.asarray(np.where(written[None, :, None, :, None], x, np.nan), dtype)

    q = jnp.asarray(rng.standard_normal((T, N, H)), dtype)
    sinks = jnp.asarray(rng.standard_normal(N), jnp.float32) if sinks else None
    arrays = q, pages(), None if latent else pages()
    step = jax.tree.map(jnp.asarray, step)
    return *run(**options)(arrays, step, jnp.int32(window), sinks), step


def test_a_neighbours_nan_stays_there():
    """A sequence whose values are NaN shares every tile of rows with one that is sound."""
    rng = np.random.default_rng(0)
    pages = jnp.asarray(rng.standard_normal((1, 3, 1, 8, 128)), jnp.float32).at[:, 1].set(jnp.nan)
    q = jnp.asarray(rng.standard_normal((6, 2, 128)), jnp.float32)
    starts, lens = jnp.array([0, 2, 4, 6], jnp.int32), jnp.array([5, 6, 7], jnp.int32)
    step = Ragged(starts, lens, jnp.arange(3, dtype=jnp.int32)[:, None], jnp.int32(3))
    args = (q, pages, pages, 0, step)
    o, lse = mosaic_tpu.page_attention(*args, scale=0.1, interpret=True)
    expected, expected_lse = reference.page_attention(*args, scale=0.1)
    sound = np.array([0, 1, 4, 5])
    assert np.isnan(o[2:4]).all()
    np.testing.assert_allclose(o[sound], expected[sound], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse[sound], expected_lse[sound], rtol=1e-5, atol=1e-5)


def test_masses_are_sums_of_probabilities():
    rng = np.random.default_rng(0)
    pages = rng.standard_normal((1, 3, 1, 8, 128)).astype(np.float32)
    q = rng.standard_normal((2, 2, 128)).astype(np.float32)
    starts, lens = jnp.array([0, 2], jnp.int32), jnp.array([19], jnp.int32)
    step = Ragged(starts, lens, jnp.array([[2, 0, 1]], jnp.int32), jnp.int32(1))
    stored = jnp.asarray(pages)
    *_, mass = reference.page_attention(q, stored, stored, 0, step, scale=0.3, mass=True)
    keys = pages[0, [2, 0, 1], 0].reshape(24, 128)
    for t, last in enumerate((17, 18)):
        p = np.exp(q[t] @ keys[: last + 1].T * 0.3)
        p = np.pad(p / p.sum(1, keepdims=True), ((0, 0), (0, 23 - last)))
        np.testing.assert_allclose(mass[t], p.reshape(2, 3, 8).sum(2), rtol=1e-4, atol=1e-6)


REFUSED = {
    "pages of 64 lanes": ({"W": 64}, r"\[64, 64\] lanes"),
    "small pages": ({"Z": 4}, r"Z=4 keys in a page of float32 must be a multiple of 8"),
    "bits": ({"dtype": jnp.uint16, "Z": 16}, "pages of uint16"),
    "long tables": ({"M": 2**16}, "more than 131072 entries: take larger pages"),
    "groups of heads": ({"heads": 3}, "K=2 heads of keys are not groups of 3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_says_what_it_cannot_take(name):
    sizes = {"W": 128, "Z": 8, "dtype": jnp.float32, "M": 2, "heads": 0} | REFUSED[name][0]
    pages = jax.ShapeDtypeStruct((1, 4, 2, sizes["Z"], sizes["W"]), sizes["dtype"])
    q = jax.ShapeDtypeStruct((3, 4, sizes["W"]), jnp.float32)
    step = Ragged(*(jax.ShapeDtypeStruct(s, jnp.int32) for s in ((4,), (3,), (3, sizes["M"]), ())))
    tile = mosaic_tpu.TpuTile(heads=sizes["heads"])

    def run(q, pages, step):
        return page_attention.run("mosaic_tpu", q, pages, pages, 0, step, scale=1.0, tile=tile)

    with pytest.raises(UnsupportedError, match=REFUSED[name][1]):
        jax.eval_shape(run, q, pages, step)


@pytest.mark.parametrize(("device", "heads"), [("v5e", 8), ("v5p", 4)])
def test_two_cores_share_the_heads(device, heads):
    """Programs along the grid's first axis are those that cores share."""
    case = next(case for case in page_attention.cases if case.name == "decode-32k")
    args, arrays = jax.eval_shape(case.make, jax.random.key(0))

    def run(args, arrays):
        return page_attention(*args, target=Target("tpu", device), **arrays, **case.options)

    lowered = str(jax.make_jaxpr(run)(args, arrays))
    assert f"grid=({8 // heads}, 1)" in lowered


@pytest.mark.slow
def test_heads_may_be_split_over_programs():
    """As a chip of two cores wants it."""
    case = next(case for case in page_attention.cases if case.name == "mixed-grouped")
    args, arrays = case.make(jax.random.key(0))
    tile = mosaic_tpu.TpuTile(keys=32, tokens=16, heads=1)
    found = page_attention.run(
        "mosaic_tpu", *args, tile=tile, interpret=True, **arrays, **case.options
    )
    for x, y in zip(found, reference.page_attention(*args, **arrays, **case.options), strict=True):
        np.testing.assert_allclose(x, y, rtol=0.01, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"splits": 3}, {"tiles": 2, "stages": 2}])
def test_tiles_on_hopper(options):
    """Shares of keys that merge, of which some are empty; two tiles of rows that share a ring."""
    rng = np.random.default_rng(0)
    step, pages = step_of((1, 35), (70, 40), 16)
    stored = rng.standard_normal((2, 1, pages, 1, 16, 64)).astype(jnp.bfloat16)
    held = np.zeros((pages, 16), bool)
    for r, length in enumerate(step.kv_lens):
        at = np.arange(length)
        held[step.tables[r, at // 16], at % 16] = True
    junk = jnp.array([1e4, jnp.nan], stored.dtype)  # the simulator's products warn of a key's NaN
    junk = junk[:, None, None, None, None, None]
    stored = jnp.where(held[None, None, :, None, :, None], stored, junk)
    q = jnp.asarray(rng.standard_normal((36, 4, 64)), jnp.bfloat16)
    sinks = jnp.asarray(rng.standard_normal(4), jnp.float32)
    args = (q, *stored, 0, jax.tree.map(jnp.asarray, step))
    tile, interpret = mosaic_gpu.GpuTile(**options), simulators.gpu()
    found = mosaic_gpu.page_attention(*args, scale=0.3, sinks=sinks, tile=tile, interpret=interpret)
    expected = reference.page_attention(*args, scale=0.3, sinks=sinks)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("blocks", "steps", "prompts", "splits"),
    [
        (8, 512, False, 15),  # one long sequence of eight heads
        (256, 512, False, 1),  # two whole waves already
        (150, 512, False, 4),  # five waves of 600, not two of which one is nearly empty
        (64, 8, False, 2),
        (1, 3, False, 1),
        (100, 512, True, 1),
    ],
)
def test_shares_of_keys_fill_the_cores(blocks, steps, prompts, splits):
    assert mosaic_gpu_tiling._splits(blocks, steps, prompts) == splits


@pytest.mark.slow
@pytest.mark.parametrize("splits", [1, 3])
def test_wide_latents_on_hopper(splits):
    """Values of 384 lanes, a window, shares of keys, masses of pages that lie in several."""
    rng = np.random.default_rng(0)
    step, pages = step_of((1, 2), (90, 40), 32)
    stored = rng.standard_normal((1, pages, 1, 32, 512)).astype(jnp.bfloat16)
    held = np.zeros((pages, 32), bool)
    for r, length in enumerate(step.kv_lens):
        at = np.arange(length)
        held[step.tables[r, at // 32], at % 32] = True
    stored = jnp.where(held[None, :, None, :, None], stored, jnp.array(1e4, stored.dtype))
    q = jnp.asarray(rng.standard_normal((3, 8, 400)), jnp.bfloat16)
    args = (q, stored, None, 0, jax.tree.map(jnp.asarray, step))
    options = {"scale": 0.05, "window": jnp.int32(70), "value_dim": 384, "soft_cap": 4.0}
    options["mass"] = splits > 1
    tile = mosaic_gpu.GpuTile(splits=splits)
    found = mosaic_gpu.page_attention(*args, **options, tile=tile, interpret=simulators.gpu())
    for x, y in zip(found, reference.page_attention(*args, **options), strict=True):
        np.testing.assert_allclose(x, y, rtol=0.02, atol=0.02)


REFUSED_ON_HOPPER = {
    "float32": ({"dtype": jnp.float32}, {}, "pages of float32: keep them in bfloat16"),
    "wide values": ({"W": 640}, {}, "values of 640 lanes in pages of 640: whole 64s, .* to 256"),
    "wide latents": ({"W": 640, "latent": True}, {"value_dim": 576}, "576 lanes .* up to 512"),
    "groups": (
        {"W": 640, "latent": True},
        {"value_dim": 512, "tile": mosaic_gpu.GpuTile(tiles=2)},
        "tiles=2 of rows, .*: one, whose values",
    ),
    "no room": (
        {"W": 640, "latent": True},
        {"value_dim": 512, "tile": mosaic_gpu.GpuTile(stages=3)},
        "3 blocks of 64 keys of 576 .* bytes of shared memory",
    ),
    "odd pages": ({"Z": 24}, {}, "Z=24 keys in a page: a power of two"),
}


@pytest.mark.parametrize("name", REFUSED_ON_HOPPER)
def test_it_says_what_it_cannot_take_on_hopper(name):
    sizes, options, message = REFUSED_ON_HOPPER[name]
    sizes = {"W": 128, "Z": 16, "dtype": jnp.bfloat16, "latent": False} | sizes
    pages = jax.ShapeDtypeStruct((1, 4, 2, sizes["Z"], sizes["W"]), sizes["dtype"])
    q = jax.ShapeDtypeStruct((3, 4, 576 if sizes["latent"] else sizes["W"]), jnp.bfloat16)
    step = Ragged(*(jax.ShapeDtypeStruct(s, jnp.int32) for s in ((4,), (3,), (3, 2), ())))

    def run(q, pages, step):
        values = None if sizes["latent"] else pages
        return page_attention.run("mosaic_gpu", q, pages, values, 0, step, scale=1.0, **options)

    with pytest.raises(UnsupportedError, match=message):
        jax.eval_shape(run, q, pages, step)


@functools.cache
def both_writes(tile):
    def run(*args):
        found = page_write.run("mosaic_tpu", *args, tile=tile, interpret=True)
        return found, page_write.reference(*args)

    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


WRITERS = [
    mosaic_tpu_writing.TpuTile(slots=8, items=2),
    mosaic_tpu_writing.TpuTile(slots=16, items=3),
    mosaic_tpu_writing.TpuTile(slots=32),
]


@pytest.mark.parametrize("tile", WRITERS, ids=lambda tile: f"{tile.slots} slots")
@given(step=steps(Z=32), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=12, deadline=None)
def test_slots_of_new_tokens_and_no_others_are_written(tile, step, seed):
    rng = np.random.default_rng(seed)
    pages = jnp.asarray(rng.standard_normal((2, L, R * M, 2, 32, 128)), jnp.float32)
    k, v = jnp.asarray(rng.standard_normal((2, T, 2, 100)), jnp.float32)
    step = jax.tree.map(jnp.asarray, step)
    found, expected = both_writes(tile)(*pages, k, v, jnp.int32(LAYER), step)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


def test_writing_says_what_it_cannot_take():
    pages, k = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 4, 2, 24, 128), (3, 2, 128)))
    step = Ragged(*(jax.ShapeDtypeStruct(s, jnp.int32) for s in ((4,), (3,), (3, 2), ())))
    with pytest.raises(UnsupportedError, match="16 slots: take a divisor of Z=24, whole 8s"):
        jax.eval_shape(lambda *a: page_write.run("mosaic_tpu", *a[:4], 0, a[4]),
                       pages, pages, k, k, step)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_blocks_of_tokens_are_written_on_hopper(tokens):
    """Blocks that begin in one sequence and end in another, or behind the last; wide rows."""
    rng = np.random.default_rng(0)
    step, pages = step_of((1, 5, 3, 1), (40, 21, 3, 16), 16, idle=1)
    stacks = jnp.asarray(rng.standard_normal((2, L, pages, 2, 16, 320)), jnp.bfloat16)
    k, v = jnp.asarray(rng.standard_normal((2, 10, 2, 300)), jnp.float32)
    args = (*stacks, k, v, jnp.int32(LAYER), jax.tree.map(jnp.asarray, step))
    tile = mosaic_gpu_writing.GpuTile(tokens=tokens)
    found = on_hopper(functools.partial(page_write.run, "mosaic_gpu", *args, tile=tile))
    for x, y in zip(found, page_write.reference(*args), strict=True):
        np.testing.assert_array_equal(x, y)


REFUSED_WRITES_ON_HOPPER = {
    "eight bits": ({"dtype": jnp.int8}, 0, "pages of int8: keep them"),
    "narrow": ({"W": 32, "K": 1}, 0, "K=1 heads of .* must fill lines of 64"),
    "too many": ({}, 512, "512 tokens with 2 heads of .* 96 would"),
}


@pytest.mark.parametrize("name", REFUSED_WRITES_ON_HOPPER)
def test_writing_says_what_it_cannot_take_on_hopper(name):
    sizes, tokens, message = REFUSED_WRITES_ON_HOPPER[name]
    sizes = {"W": 128, "K": 2, "dtype": jnp.bfloat16} | sizes
    shape = (1, 4, sizes["K"], 16, sizes["W"])
    pages = jax.ShapeDtypeStruct(shape, sizes["dtype"])
    k = jax.ShapeDtypeStruct((3, sizes["K"], sizes["W"]), jnp.float32)
    step = Ragged(*(jax.ShapeDtypeStruct(s, jnp.int32) for s in ((4,), (3,), (3, 2), ())))
    tile = mosaic_gpu_writing.GpuTile(tokens)
    with pytest.raises(UnsupportedError, match=message):
        jax.eval_shape(lambda *a: page_write.run("mosaic_gpu", *a[:4], 0, a[4], tile=tile),
                       pages, pages, k, k, step)  # fmt: skip


@pytest.mark.aot
@pytest.mark.usefixtures("no_compilation_cache")
@pytest.mark.parametrize(
    ("body", "target"), [("mosaic_tpu", "v6e:2x2"), ("mosaic_gpu", "h200:1x1x1")]
)
@pytest.mark.parametrize("name", ["decode-256", "latent-decode-128"])
def test_donated_caches_stay_where_they_are(body, target, name):
    mesh = NamedSharding(compile_only.mesh(target), PartitionSpec())
    case = next(case for case in page_write.cases if case.name == name)
    args, _ = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=mesh),
        jax.eval_shape(case.make, jax.random.key(0)),
    )
    write = jax.jit(lambda *args: page_write.run(body, *args), donate_argnums=(0, 1))
    memory = write.lower(*args).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= sum(x.size * 2 for x in args[:2] if x is not None)
    assert memory.temp_size_in_bytes < 2**21


@pytest.mark.parametrize("name", ["mixed-grouped", "mass-bf16", "int8-windowed"])
def test_heads_side_by_side_get_the_bits_that_each_gets_alone(name: str, monkeypatch):
    case = next(case for case in page_attention.cases if case.name == name)
    args, arrays = case.make(jax.random.key(0))

    def run() -> list[np.ndarray]:
        found = page_attention.run("mosaic_tpu", *args, interpret=True, **arrays, **case.options)
        return [np.asarray(x) for x in jax.tree.leaves(found)]

    together = run()
    monkeypatch.setattr(mosaic_tpu_blocks, "_MOST_LOGITS", 0)
    for x, y in zip(together, run(), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("heads", "rows", "at_once"),
    [(8, 16, 8), (8, 128, 4), (32, 16, 8), (6, 16, 6), (6, 128, 3), (1, 128, 1)],
)
def test_as_many_heads_side_by_side_as_divide_them(heads: int, rows: int, at_once: int):
    shape = mosaic_tpu_blocks.Shape(heads, 4, 64, 4, 32, 64, 8, 16, 128, 1.0, 0.0, False)
    assert shape.heads_at_once(rows) == at_once
