"""Pages of eight and four bits: what a row loses, who else notices, attention over what is left."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import cpu
from kernels_pallas.op import UnsupportedError
from kernels_pallas.paged_attention import Ragged, codec, gathered, ops, paged_attention, reference
from kernels_pallas.paged_attention.cases import batch as step_of
from kernels_pallas.paged_attention.cases import pages_of
from kernels_pallas.paged_attention.ragged import locate
from tests.kernels_pallas import simulators
from tests.kernels_pallas.test_registry import agree
from tests.sparing import sparing

L, LAYER, Z = 2, 1, 16
FORMATS = ("int8", "static", "int4")


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def fast(function, **options):
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **options)


put = fast(codec.put)


@functools.cache
def blank(kind, P, K, lanes, parts=None, seed=9):
    """Pages with something in them."""
    shape = (L, P, K, Z, lanes)
    pages = codec.empty(jnp.int4 if kind == "int4" else jnp.int8, shape, parts=parts)
    if kind == "static":
        scale = codec.calibrate(normal(seed, L, 50, K, lanes), margin=1.5)
        pages = codec.StaticInt8Pages(pages.values, scale)
    page, slot = jnp.divmod(jnp.arange(P * Z), Z)
    for layer in range(L):
        pages = put(pages, normal(seed + layer, P * Z, K, lanes), layer, page, slot)
    return pages


@fast
def floats(pages):
    """What pages stand for, [L, P, K, Z, W]."""
    every = jnp.arange(pages.shape[1])
    layers = [codec.rotated(pages, codec.take(pages, layer, every)) for layer in range(L)]
    return jnp.stack(layers)


def steps_of(pages, layer, at):
    """Of each lane of the rows in slots 0 of pages `at`: how far apart its values lie."""
    if isinstance(pages, codec.StaticInt8Pages):
        return np.broadcast_to(pages.scale[layer], (len(at), *pages.scale.shape[1:]))
    K = pages.shape[2]
    scale = np.abs(np.asarray(pages.scale[layer, at, :, 0])).reshape(len(at), K, -1)
    return np.repeat(scale, pages.parts, -1)


@fast
def written(pages, x, at, slot):
    """Pages with rows x, those rows as they are read, and what they should be."""
    pages = codec.put(pages, x, LAYER, at, slot)
    return pages, codec.take(pages, LAYER, at)[:, :, 0], codec.rotated(pages, x)


@st.composite
def parts(draw):
    return tuple(draw(st.lists(st.integers(1, 20).map(lambda n: 8 * n), min_size=1, max_size=3)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
@given(parts=parts(), K=st.integers(1, 3), seed=st.integers(0, 2**31), power=st.integers(-20, 20))
@settings(max_examples=8, deadline=None)
def test_a_row_loses_half_a_step_at_most(kind, parts, K, seed, power):
    T, lanes = 5, sum(parts)
    x = normal(seed, T, K, lanes) * (2.0**power if kind != "static" else 1.0)
    at, zeros = jnp.arange(T), jnp.zeros(T, jnp.int32)
    pages, read, meant = written(blank(kind, T, K, lanes, parts), x, at, zeros)
    step = steps_of(pages, LAYER, at)
    if kind == "static":
        meant = np.clip(meant, -127 * step, 127 * step)
    most = 1.0 if kind == "int4" else 0.5  # the range of four bits ends at -8 and 7
    rounding = 1e-5 * np.abs(meant).max()
    assert (np.abs(read - meant) <= most * step + rounding).all()
    assert (np.abs(read - meant).mean() <= 0.3 * step.mean() + rounding).all()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_lost_and_no_other(kind, bad):
    x = normal(0, 3, 2, 40).at[1, 0, 7].set(bad).at[2, 1].set(0.0)
    at = jnp.arange(3)
    before = blank(kind, 2, 2, 40, (24, 16))
    pages = put(before, x, LAYER, jnp.zeros(3, jnp.int32), at)
    found, expected = floats(pages), floats(before)
    sound = put(before, jnp.nan_to_num(x), LAYER, jnp.zeros(3, jnp.int32), at)
    expected = expected.at[LAYER, 0, :, :3].set(floats(sound)[LAYER, 0, :, :3])
    lost = np.zeros(found.shape, bool)
    lost[LAYER, 0, 0, 1] = True
    np.testing.assert_array_equal(np.where(lost, 0, found), np.where(lost, 0, expected))
    assert not np.asarray(found[LAYER, 0, 1, 2]).any()
    if kind != "static":  # which cuts what is too large
        assert not np.isfinite(found[LAYER, 0, 0, 1]).all()


@pytest.mark.slow
@pytest.mark.parametrize("lanes", [8, 48, 128, 192, 576])
def test_a_rotation_leaves_scores_and_undoes_itself(lanes):
    pages = blank("int4", 1, 1, lanes, (512, 64) if lanes == 576 else None)
    q, k = normal(0, 7, lanes), normal(1, 9, lanes)
    rotated = codec.rotated(pages, q)
    np.testing.assert_allclose(rotated @ codec.rotated(pages, k).T, q @ k.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(codec.rotated(pages, rotated), q, rtol=1e-5, atol=1e-5)
    assert np.abs(rotated - q).max() > 0.5


def test_a_rotation_spreads_outliers():
    """Two large lanes of 128 cost four bits a tenth of the rows without it, and under 1 % with."""
    x = normal(0, 200, 1, 128) * jnp.ones(128).at[jnp.array([3, 77])].set(20.0)
    pages = codec.empty(jnp.int4, (1, 200, 1, 2, 128))
    error = fast(codec.round_trip)(pages, x, 0) - x
    nibbles, scale = codec._quantize_nibbles(x)
    nibbles = (np.asarray(nibbles, np.int8) ^ 8) - 8
    plain = nibbles * np.asarray(scale)[..., None] - x
    power = float((x**2).mean())
    assert float((error**2).mean()) < 0.01 * power < 0.05 * power < float((plain**2).mean())


@pytest.mark.parametrize("block", [2, 16, 128])
def test_it_is_sylvesters_matrix(block):
    matrix = functools.reduce(np.kron, [np.array([[1, 1], [1, -1]])] * (block.bit_length() - 1))
    np.testing.assert_allclose(
        codec.hadamard(jnp.eye(block), block), matrix * block**-0.5, rtol=1e-6
    )


VARIANTS = {
    "grouped": {"N": 4, "K": 2, "H": 32},
    "short heads": {"N": 2, "K": 1, "H": 24, "W": 32},
    "window, sinks, cap": {"N": 4, "K": 2, "H": 64, "window": 7, "sinks": True, "soft_cap": 3.0},
    "wide values": {"N": 2, "K": 2, "H": 16, "Hv": 192},
    "latent": {"N": 4, "K": 1, "H": 112, "value_dim": 96, "latent": (96, 16)},
    "wide latent": {"N": 4, "K": 1, "H": 272, "value_dim": 256, "latent": (256, 16)},
}


def arrays_of(kind, *, N, K, H, W=0, Hv=0, window=0, sinks=False, latent=None, **options):
    step, P = step_of((1, 21, 1, 3), (70, 40, 9, 64), Z, 2)
    T, W = 26, W or H
    k_pages = blank(kind, P, K, W, latent)
    v_pages = None if latent else blank(kind, P, K, Hv or W, seed=5)
    k, v = normal(1, T, K, H), None if latent else normal(2, T, K, Hv or H)
    extra = {"window": jnp.int32(window), "sinks": normal(4, N) if sinks else None}
    args = normal(3, T, N, H), k, v, k_pages, v_pages, jnp.int32(LAYER)
    return (*args, jax.tree.map(jnp.asarray, step)), extra, {"scale": 0.3, **options}


@functools.cache
def compiled(kernel, **static):
    return fast(lambda args, arrays: kernel(*args, **arrays, **static))


@pytest.mark.parametrize("kernel", [paged_attention, gathered.paged_attention])
@pytest.mark.parametrize("variant", sparing(VARIANTS, "grouped", "window, sinks, cap", "latent"))
@pytest.mark.parametrize("kind", FORMATS)
def test_attention_is_that_over_what_pages_stand_for(kind, variant, kernel):
    args, arrays, options = arrays_of(kind, **VARIANTS[variant])
    q, k, v, k_pages, v_pages, layer, step = args
    o, lse, *stored = compiled(kernel, **options)(args, arrays)
    _, position = locate(step, q.shape[0])
    real = np.asarray(position) >= 0
    dense = [None if x is None else floats(x) for x in stored]
    attend = compiled(reference.page_attention, **options)
    expected = attend((q, *dense, layer, step), arrays)
    for x, y in zip((o, lse), expected, strict=True):
        np.testing.assert_allclose(x[real], y[real], rtol=2e-4, atol=2e-5)
    written = compiled(reference.page_write)((k_pages, v_pages, k, v, layer, step), {})
    jax.tree.map(np.testing.assert_array_equal, tuple(stored), written)


@pytest.mark.parametrize("kind", FORMATS)
def test_masses_of_pages_are_those_of_the_decoded_cache(kind):
    (q, _, _, *pages, layer, step), arrays, options = arrays_of(kind, N=4, K=2, H=32)
    attend = compiled(reference.page_attention, mass=True, **options)
    *_, found = attend((q, *pages, layer, step), arrays)
    *_, expected = attend((q, *map(floats, pages), layer, step), arrays)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_a_gradient_passes_the_rounding(kind):
    """That of a cache of floats which holds what this one decodes to."""
    args, arrays, options = arrays_of(kind, N=4, K=2, H=32)
    q, k, v, k_pages, v_pages, *where = args
    dense = floats(k_pages), floats(v_pages)

    def loss(new, pages):
        return (paged_attention(*new, *pages, *where, **arrays, **options)[0] ** 2).mean()

    def gradient(pages):
        return fast(jax.grad(lambda new: loss(new, pages)))((q, k, v))

    for x, y in zip(gradient((k_pages, v_pages)), gradient(dense), strict=True):
        off, size = (float(jnp.linalg.norm(z)) for z in (x - y, y))
        assert 0 < off < (0.3 if kind == "int4" else 0.03) * size


native = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")


@functools.cache
def in_cpp(**static):
    def run(q, k, v, k_pages, v_pages, layer, step, options):
        return cpu.paged_attention(q, k, v, k_pages, v_pages, layer, *step[:4], **options, **static)

    return jax.jit(run)


@native
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "short heads"])
@pytest.mark.parametrize("kind", FORMATS)
def test_native_kernels_keep_the_contract(kind, variant):
    """Pages to the bit; what is read from them and queries are rounded to bfloat16."""
    args, arrays, options = arrays_of(kind, **VARIANTS[variant])
    o, lse, *stored = in_cpp(**options)(*args, arrays)
    reference_of = compiled(reference.paged_attention, **options)
    *expected, k_pages, v_pages = reference_of(args, arrays)
    jax.tree.map(np.testing.assert_array_equal, tuple(stored), (k_pages, v_pages))
    real = int(args[-1].row_starts[args[-1].num_seqs])
    for x, y in zip((o, lse), expected, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        np.testing.assert_allclose(x[:real], y[:real], atol=0.02 * float(jnp.abs(y).max()))


@native
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int4])
def test_native_kernels_leave_padding_of_scales_alone(dtype):
    """Three heads have three rows of scales, which a page may pad to eight."""
    (q, k, v, *_, layer, step), arrays, options = arrays_of("int8", N=3, K=3, H=32)
    P = blank("int8", step_of((1, 21, 1, 3), (70, 40, 9, 64), Z, 2)[1], 3, 32).shape[1]
    pages = codec.empty(dtype, (L, P, 3, Z, 32), whole=True)
    pages = put(pages, normal(7, P * Z, 3, 32), LAYER, *jnp.divmod(jnp.arange(P * Z), Z))
    o, _, *stored = in_cpp(**options)(q, k, v, pages, pages, layer, step, arrays)
    want, _, *expected = compiled(reference.paged_attention, **options)(
        (q, k, v, pages, pages, layer, step), arrays
    )
    jax.tree.map(np.testing.assert_array_equal, stored, expected)
    np.testing.assert_allclose(o, want, atol=0.02 * float(jnp.abs(want).max()))


@native
def test_native_kernels_say_what_they_cannot_take():
    """They would read past the end of rows, or turn lanes that are another head's."""
    run = functools.partial(jax.eval_shape, in_cpp(scale=1.0, value_dim=96))
    (q, k, _, pages, _, *rest), arrays, _ = arrays_of("int4", N=4, K=1, H=128)
    with pytest.raises(UnsupportedError, match=r"value_dim=96 .* 128 lanes, and end a part"):
        run(q, k, None, pages, None, *rest, arrays)
    short, k_pages = k[..., :100], jnp.zeros(pages.shape)
    with pytest.raises(UnsupportedError, match="rows of 100 lanes do not fit pages of 128"):
        run(q, short, None, k_pages, None, *rest, arrays)


@native
@pytest.mark.parametrize("variant", ["grouped", "latent"])
@pytest.mark.parametrize("kind", FORMATS)
def test_native_bits_do_not_depend_on_the_batch(kind, variant):
    (q, k, v, k_pages, v_pages, layer, step), arrays, options = arrays_of(kind, **VARIANTS[variant])
    run = in_cpp(**options)
    whole = run(q, k, v, k_pages, v_pages, layer, step, arrays)
    for r in range(4):
        begin, end = step.row_starts[r], step.row_starts[r + 1]
        for first in range(begin, end, 5):  # a chunk of a prompt at a time
            rows = slice(first, min(first + 5, end))
            n = rows.stop - first
            lens = step.kv_lens[r : r + 1] - (end - rows.stop)
            alone = Ragged(jnp.array([0, n]), lens, step.tables[r : r + 1], jnp.int32(1))
            new = [None if x is None else x[rows] for x in (q, k, v)]
            o, lse, k_pages, v_pages = run(*new, k_pages, v_pages, layer, alone, arrays)
            np.testing.assert_array_equal(o, whole[0][rows])
            np.testing.assert_array_equal(lse, whole[1][rows])
    jax.tree.map(np.testing.assert_array_equal, (k_pages, v_pages), tuple(whole[2:]))


TPU_PAGE = 128


def on_tpu(op, *args, **options):
    return fast(lambda args: op.run("mosaic_tpu", *args, interpret=True, **options))(args)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "static", "int4"])
@given(data=st.data(), seed=st.integers(0, 2**31))
@settings(max_examples=5, deadline=None)
def test_the_tpu_writer_touches_slots_of_new_tokens_alone(kind, data, seed):
    """And a former owner's NaN, of which a page's scales are full, does not spread."""
    new = tuple(data.draw(st.lists(st.integers(1, 40), min_size=3, max_size=3)))
    lens = tuple(n + data.draw(st.integers(0, 256 - n)) for n in new)
    (step, P), T = step_of(new, lens, TPU_PAGE), 120
    pages = pages_of(kind, jax.random.key(seed), (L, 8, 2, TPU_PAGE, 128))
    if kind != "static":
        pages = replace(pages, scale=jnp.full_like(pages.scale, jnp.nan))
    k, v = normal(seed, T, 2, 100), normal(seed + 1, T, 2, 128)
    args = pages, pages, k, v, LAYER, jax.tree.map(jnp.asarray, step)
    assert P <= 8
    found = on_tpu(ops.page_write, *args)
    jax.tree.map(np.testing.assert_array_equal, found, reference.page_write(*args))


@pytest.mark.parametrize("kind", sparing([*FORMATS, "bfloat16"], "bfloat16"))
def test_the_tpu_writer_fills_wide_rows_of_many_heads(kind):
    """Four of twelve heads at a time."""
    step, P = step_of((1, 20, 1), (140, 37, 128), TPU_PAGE)
    shape = (L, P, 12, TPU_PAGE, 256)
    pages = (
        jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
        if kind == "bfloat16"
        else pages_of(kind, jax.random.key(0), shape, (128, 128))
    )
    k, v = (normal(seed, 22, 12, 250).astype(jnp.bfloat16) for seed in (1, 2))
    args = pages, pages, k, v, LAYER, jax.tree.map(jnp.asarray, step)
    found = on_tpu(ops.page_write, *args)
    jax.tree.map(np.testing.assert_array_equal, found, reference.page_write(*args))


@pytest.mark.slow
@pytest.mark.parametrize("op", [ops.page_write, ops.page_attention], ids=lambda op: op.name)
@pytest.mark.parametrize("name", ["int8-latent", "int4"])
def test_it_has_no_race_on_a_simulated_tpu(op, name):
    case = op.case(name)
    args, arrays = case.make(jax.random.key(0))
    try:
        found = op.run("mosaic_tpu", *args, interpret=simulators.tpu(), **arrays, **case.options)
        agree(found, op.reference(*args, **arrays, **case.options), case.tolerance)
        assert not simulators.tpu_races_found()
    finally:
        simulators.reset_tpu()


@pytest.mark.parametrize(
    ("kind", "mass"),
    sparing([("int8", False), ("int8", True), ("int4", True)], ("int8", False), ("int8", True)),
)
def test_the_tpu_reader_sees_no_scales_of_former_owners(kind, mass):
    step, P = step_of((1, 3, 1), (140, 37, 256), TPU_PAGE)
    held = np.zeros((P, TPU_PAGE), bool)
    for r, length in enumerate(step.kv_lens):
        held[step.tables[r, np.arange(length) // TPU_PAGE], np.arange(length) % TPU_PAGE] = True
    key = jax.random.key(0)
    pages = pages_of(kind, key, (L, P, 2, TPU_PAGE, 128))
    pages = replace(pages, scale=jnp.where(held[None, :, None], pages.scale, jnp.nan))
    q = jax.random.normal(key, (5, 8, 128), jnp.bfloat16)
    args = q, pages, pages, LAYER, jax.tree.map(jnp.asarray, step)
    options = {"scale": 0.1, "mass": mass}
    expected = reference.page_attention(*args, **options)
    for x, y in zip(on_tpu(ops.page_attention, *args, **options), expected, strict=True):
        assert np.isfinite(y).all()
        np.testing.assert_allclose(x, y, atol=0.02 * float(jnp.abs(y).max()))


REFUSED = {
    "four bits": ("int4", {"Z": 64}, "Z=64 keys in a page of uint8 must be a multiple of 128"),
    "parts of four bits": ("int4", {"parts": (96, 32)}, "must be multiples of 128 lanes"),
    "short pages": ("int8", {"Z": 64}, "Z=64 keys in a page of int8 must be a multiple of 128"),
    "calibrated": ("static", {"Z": 16}, "Z=16 keys in a page of int8 must be a multiple of 32"),
    "parts": ("int8", {"parts": (96, 32)}, "must be multiples of 128 lanes"),
    "lanes": ("int8", {"W": 64}, r"lanes: pad them|multiples of 128 lanes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_tpu_kernels_say_what_they_cannot_take(name):
    """What those for Hopper cannot stands in test_rounded_pages_on_hopper.py."""
    kind, sizes, message = REFUSED[name]
    sizes = {"Z": 128, "W": 128, "parts": None} | sizes
    shape = (1, 4, 2, sizes["Z"], sizes["W"])
    x = jnp.zeros((3, 2, sizes["W"]))
    step, _ = step_of((1, 1, 1), (5, 6, 7), sizes["Z"])

    def run(op, *args, **options):
        pages = pages_of(kind, jax.random.key(0), shape, sizes["parts"])
        return op.run("mosaic_tpu", *[pages if a is None else a for a in args], 0, step, **options)

    with pytest.raises(UnsupportedError, match=message):
        jax.eval_shape(lambda: run(ops.page_attention, x, None, None, scale=1.0))
    with pytest.raises(UnsupportedError, match=message):
        jax.eval_shape(lambda: run(ops.page_write, None, None, x, x))


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int4])
def test_scales_of_a_page_that_would_be_copied_are_refused(dtype):
    """Three heads have three rows of them, which XLA for TPUs lays out by another axis."""
    shape, x = (1, 4, 3, TPU_PAGE, 128), jnp.zeros((3, 3, 128))
    step, _ = step_of((1, 1, 1), (5, 6, 7), TPU_PAGE)
    pages, whole = (codec.empty(dtype, shape, whole=w) for w in (False, True))
    assert [p.scale.shape[2] for p in (pages, whole)] == [3, 8]
    for run in (
        lambda p: ops.page_write.run("mosaic_tpu", p, p, x, x, 0, step),
        lambda p: ops.page_attention.run("mosaic_tpu", x, p, p, 0, step, scale=1.0),
    ):
        jax.eval_shape(run, whole)
        with pytest.raises(UnsupportedError, match=r"\[3, 3\] rows of scales: pad them to"):
            jax.eval_shape(run, pages)
