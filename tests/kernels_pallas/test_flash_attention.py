"""Attention over packed rows: blocks that are skipped, slopes, and what training makes of it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.models.attention import packed
from kernels_pallas import tuning
from kernels_pallas.flash_attention import (
    flash_attention,
    flash_attention_gradient,
    mosaic_tpu,
    mosaic_tpu_backward,
    reference,
)
from kernels_pallas.flash_attention.gpu_blocks import Walk
from kernels_pallas.flash_attention.gradient import with_gradient
from kernels_pallas.flash_attention.mosaic_gpu import ForwardTile
from kernels_pallas.flash_attention.tpu_blocks import TpuTile
from kernels_pallas.op import UnsupportedError
from kernels_pallas.target import CPU, Target
from tests.kernels_pallas import simulators
from tests.kernels_pallas.simulating import on_hopper
from tests.sparing import sparing

TPU, GPU = Target("tpu", "v6e"), Target("gpu", "h200")


def simulated(tile: TpuTile | None = None) -> Any:
    passes = mosaic_tpu.forward, mosaic_tpu_backward.backward
    return with_gradient(*(partial(run, tile=tile, interpret=True) for run in passes))


def documents(*rows: str) -> jax.Array:
    """Segments from words such as "aab.", where a dot is padding; a letter is 64 tokens."""
    letters = [[0 if c == "." else ord(c) - ord("a") + 1 for c in row] for row in rows]
    return jnp.asarray(np.repeat(letters, 64, axis=1), jnp.int32)


def operands(B: int, N: int, K: int, T: int, H: int = 64, Hv: int = 64, dtype: Any = jnp.float32):
    shapes = (B, N, T, H), (B, K, T, H), (B, K, T, Hv)
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True))


def plain(q, k, v, segments, *, scale, window=0, sinks=None, soft_cap=0.0):
    """A token after another, in float64."""
    q, k, v, segments = (np.asarray(x, np.float64) for x in (q, k, v, segments))
    B, N, T, _ = q.shape
    o, lse = np.zeros((B, N, T, v.shape[-1])), np.full((B, N, T), -np.inf)
    for b, n, t in np.ndindex(B, N, T):
        keys, head = np.arange(t + 1), n // (N // k.shape[1])
        seen = (segments[b, keys] == segments[b, t]) & (segments[b, t] > 0)
        seen &= (t - keys < window) if window else True
        s = k[b, head, keys[seen]] @ q[b, n, t] * scale
        s = soft_cap * np.tanh(s / soft_cap) if soft_cap else s
        weights = np.exp(s)
        total = weights.sum() + (0.0 if sinks is None else np.exp(float(sinks[n])))
        if total:
            o[b, n, t], lse[b, n, t] = weights @ v[b, head, keys[seen]] / total, np.log(total)
    return o, lse


@pytest.mark.parametrize("form", [reference.attend, simulated()], ids=["reference", "mosaic_tpu"])
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 30}, {"soft_cap": 2.0}, {"sinks": jnp.array([0.5, -1.0])}],
    ids=["plain", "window", "soft_cap", "sinks"],
)
def test_is_a_softmax_over_what_a_token_sees(form, options):
    q, k, v = operands(2, 2, 1, 128)
    segments = documents("ab", "a.").at[0, :70].set(7)
    found = form(q, k, v, segments, scale=0.3, **options)
    for x, y in zip(found, plain(q, k, v, segments, scale=0.3, **options), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(
    words=st.lists(st.sampled_from(["aaaaaaaa", "aabbbcdd", "abcdefgh", "aaaaa...", "..aabb.c"]),
                   min_size=1, max_size=2),
    heads=st.sampled_from([(1, 1), (4, 2)]),
    widths=st.sampled_from([(64, 64), (128, 64), (96, 128)]),
    tile=st.sampled_from([(128, 128), (256, 128), (128, 512), (512, 256)]),
    window=st.sampled_from([0, 1, 100, 300]),
    sunk=st.booleans(),
    soft_cap=st.sampled_from([0.0, 3.0]),
)  # fmt: skip
def test_values_and_slopes_whatever_is_skipped(words, heads, widths, tile, window, sunk, soft_cap):
    (N, K), segments = heads, documents(*words)
    q, k, v = operands(len(words), N, K, 512, *widths)
    sinks = jnp.linspace(-1.0, 1.0, N) if sunk else None
    options = {"scale": 0.2, "window": window, "soft_cap": soft_cap}

    assert not disagreements(TpuTile(*tile), (q, k, v, sinks), segments, options)


def test_a_sink_of_minus_infinity_is_none():
    """Where all of a first block of keys is hidden, the maximum is the sink's."""
    q, k, v = operands(1, 2, 1, 256)
    options = {"scale": 0.2, "window": 0, "soft_cap": 0.0}
    arguments = q, k, v, jnp.array([0.3, -jnp.inf])
    assert not disagreements(TpuTile(128, 128), arguments, documents("aaab"), options)


@pytest.mark.slow
def test_a_sink_of_minus_infinity_is_none_on_hopper():
    q, k, v = operands(1, 2, 1, 256, dtype=jnp.bfloat16)
    options = {"scale": 0.2, "sinks": jnp.array([0.3, -jnp.inf])}
    run = partial(flash_attention.run, "mosaic_gpu", q, k, v, documents("aaab"), **options)
    expected = reference.attend(q, k, v, documents("aaab"), **options)
    for x, y in zip(on_hopper(run), expected, strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(x, y, rtol=0, atol=0.02)


def test_what_tokens_that_see_nothing_are_asked_reaches_no_key():
    """Merging two results gives their lse a slope of NaN."""
    q, k, v = operands(1, 2, 1, 128)
    segments, sees = documents("a."), documents("a.")[:, None] > 0

    def score(form, q, k, v):
        _, lse = form(q, k, v, segments, scale=0.1)
        both = jnp.logaddexp(lse, lse + 1)
        return jnp.sum(jnp.where(sees, both - 2 * jnp.where(sees, 0.0, lse) ** 2, 0.0))

    slopes = [jax.grad(partial(score, form), (0, 1, 2))(q, k, v)
              for form in (reference.attend, simulated())]  # fmt: skip
    for x, y in zip(*slopes, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("T", "H"), sparing(itertools.product((384, 512), (64, 128)), (384, 128), (512, 64))
)
def test_every_part_of_a_block_is_attended(T, H):
    """One block of queries and keys, of three parts or two."""
    q, k, v = operands(1, 2, 1, T, H, H)
    options = {"scale": 0.2, "window": 200, "soft_cap": 3.0}
    segments = documents("aabbbcdd")[:, :T]
    assert not disagreements(TpuTile(), (q, k, v, jnp.linspace(-1.0, 1.0, 2)), segments, options)


def disagreements(tile, arguments, segments, options) -> list[str]:
    """Where kernel and reference differ: in results, or slopes of a sum in which both weigh."""

    def both(form):
        def score(q, k, v, sinks):
            o, lse = form(q, k, v, segments, sinks=sinks, **options)
            seen = jnp.where(jnp.isfinite(lse), lse, 0.0)
            return jnp.sum(jnp.sin(o)) + jnp.sum(seen**2), (o, lse)

        wanted = (0, 1, 2) if arguments[-1] is None else (0, 1, 2, 3)
        return jax.jit(jax.grad(score, wanted, has_aux=True))(*arguments)

    found, expected = both(simulated(tile)), both(reference.attend)
    wrong = []
    for (path, x), y in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        bound = 2e-5 * max(1.0, float(jnp.abs(jnp.where(jnp.isfinite(y), y, 0)).max()))
        if x.shape != y.shape or not np.allclose(x, y, rtol=0, atol=bound, equal_nan=True):
            wrong.append(f"{jax.tree_util.keystr(path)}: {np.abs(x - y).max()} over {bound}")
    return wrong


@pytest.mark.slow
def test_blocks_one_after_another_have_no_race():
    """The registry's cases are a block or two; here accumulators are kept over several."""
    q, k, v = operands(1, 2, 1, 384)
    options = {"scale": 0.2, "window": 200, "sinks": None, "soft_cap": 0.0}
    segments = documents("aabbbb")
    o, lse = reference.attend(q, k, v, segments, **options)
    slopes = segments, o, lse, jnp.cos(o), jnp.zeros_like(lse)
    kernel = {"tile": TpuTile(128, 128), "interpret": simulators.tpu()}
    try:
        found = mosaic_tpu.forward(q, k, v, segments, **options, **kernel)
        assert not simulators.tpu_races_found()
        found += mosaic_tpu_backward.backward(q, k, v, *slopes, **options, **kernel)[:3]
        assert not simulators.tpu_races_found()
    finally:
        simulators.reset_tpu()
    expected = o, lse, *reference.gradient(q, k, v, *slopes, **options)[:3]
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4)


def test_only_blocks_that_see_each_other_are_steps():
    first = reference.first_seen(documents("aaaabbbb"), 0)
    steps = reference.query_major(first, 128, 128)
    pairs = [(int(i), int(j)) for i, j in zip(steps.outer, steps.inner, strict=True)]
    assert pairs[: int(steps.total)] == [(0, 0), (1, 0), (1, 1), (2, 2), (3, 2), (3, 3)]
    masked = (np.asarray(steps.flags) & reference.MASKED > 0)[: int(steps.total)]
    assert masked.tolist() == [True, False, True, True, False, True]
    steps = reference.key_major(reference.first_seen(documents("aaaaaaaa"), 129), 128, 128)
    pairs = [(int(j), int(i)) for j, i in zip(steps.outer, steps.inner, strict=True)]
    assert pairs[: int(steps.total)] == [(0, 0), (0, 1), (1, 1), (1, 2), (2, 2), (2, 3), (3, 3)]


@given(
    words=st.lists(st.text("ab.", min_size=8, max_size=8), min_size=1, max_size=2),
    size=st.sampled_from([64, 128]),
    window=st.sampled_from([0, 100, 300]),
)
@settings(max_examples=40, deadline=None)
def test_hopper_walks_what_is_seen_once_and_masks_what_is_hidden_in_part(words, size, window):
    """Both walks: over the keys of a block of queries, and over the queries of a block of keys."""
    segments = documents(*words)
    first = np.asarray(reference.first_seen(segments, window))
    B, T = first.shape
    at = np.arange(T)
    seen = (first[:, :, None] <= at) & (at <= at[:, None])  # [B, queries, keys]
    for table, by_block in (
        (Walk.over_keys(jnp.asarray(first), size), seen),
        (Walk.over_queries(jnp.asarray(first), size), seen.swapaxes(1, 2)),
    ):
        for row in range(B):
            for block in range(T // 128):
                walk = Walk(*np.asarray(table[row, block]))
                tiles = [int(walk.tile(step)) for step in range(walk.steps)]
                part = by_block[row, block * 128 : block * 128 + 128].reshape(128, -1, size)
                assert set(np.flatnonzero(part.any((0, 2)))) <= set(tiles)
                assert len(set(tiles)) == len(tiles)
                assert all(part[:, tile].all() for tile in tiles[int(walk.masked) :])


def test_a_window_may_be_known_only_at_run_time():
    q, k, v = operands(1, 2, 1, 256)
    segments = documents("aabb")
    attend = jax.jit(lambda w: simulated()(q, k, v, segments, scale=0.2, window=w))
    for window in (0, 50):
        o, _ = attend(window)
        expected, _ = reference.attend(q, k, v, segments, scale=0.2, window=window)
        np.testing.assert_allclose(o, expected, atol=2e-5)


FORMS = [
    partial(flash_attention, target=CPU),
    pytest.param(simulated(), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("form", FORMS)
def test_training_attends_as_before(form):
    """What `packed` makes of both forms, and of their slopes, but for padding."""
    B, T, N, K, H = 1, 256, 4, 2, 64
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in operands(B, N, K, T))
    segments = documents("abb.")
    positions = jnp.asarray(np.r_[0:64, 0:128, [0] * 64][None], jnp.int32)
    real = (segments > 0)[..., None, None]
    options = {"scale": H**-0.5, "window": 40, "sinks": jnp.linspace(0.0, 1.0, N), "soft_cap": 3.0}

    def slopes(attention):
        def score(q, k, v):
            o, kv = packed(segments, positions, attention)(q, k, v, "kv", 0, **options)
            assert kv == "kv"
            return jnp.sum(jnp.where(real, jnp.cos(o), 0.0))

        return jax.value_and_grad(score, (0, 1, 2))(q, k, v)

    found, expected = slopes(form), slopes(None)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-4)


def test_each_pass_has_a_tile_of_its_own(monkeypatch):
    """Tuned separately: what suits the forward pass may not even fit the other one."""
    passes = flash_attention, flash_attention_gradient
    tiles = {op.name: {"q": 128 * n, "k": 384 - 128 * n} for n, op in enumerate(passes, 1)}
    monkeypatch.setattr(tuning, "tuned", lambda device, op, signature: ("mosaic_tpu", tiles[op]))
    taken = []
    for op in passes:
        body = op.bodies["mosaic_tpu"]

        def run(*args, tile, interpret, body=body, **options):
            taken.append(tile)
            return body.run(*args, tile=tile, interpret=True, **options)

        monkeypatch.setitem(op.bodies, "mosaic_tpu", replace(body, run=run))
    q, k, v = operands(1, 2, 1, 256)
    attend = partial(flash_attention, segments=documents("aabb"), scale=0.2, target=TPU)
    jax.eval_shape(jax.grad(lambda *x: jnp.sum(attend(*x)[0]), (0, 1, 2)), q, k, v)
    assert taken == [TpuTile(128, 256), TpuTile(256, 128)]


@pytest.mark.parametrize(
    ("sizes", "dtype", "message"),
    [
        ((1, 2, 1, 200), jnp.float32, "T=200 must be a multiple of 128"),
        ((1, 3, 2, 128), jnp.float32, "N=3 heads cannot share K=2"),
        ((1, 2, 1, 128), jnp.float16, "all must be bfloat16, or all float32"),
    ],
)
def test_the_tpu_kernel_says_what_it_refuses(sizes, dtype, message):
    q, k, v = operands(*sizes, dtype=dtype)
    segments = jnp.ones((1, sizes[3]), jnp.int32)
    with pytest.raises(UnsupportedError, match=message):
        flash_attention.run("mosaic_tpu", q, k, v, segments, scale=1.0)


@pytest.mark.parametrize(
    ("sizes", "dtype", "tile", "message"),
    [
        ((1, 2, 1, 192), jnp.bfloat16, None, "T=192 must be a multiple of 128"),
        ((1, 2, 1, 128), jnp.float32, None, "only bfloat16"),
        ((1, 2, 1, 128, 192, 128), jnp.bfloat16, None, "H=192 and Hv=128: only 64 and 128"),
        ((1, 2, 1, 128), jnp.bfloat16, ForwardTile(tokens=96), "must be of 64 or 128 tokens"),
        ((1, 2, 1, 128, 128, 128), jnp.bfloat16, ForwardTile(128, 4), "bytes of shared memory"),
    ],
)
def test_the_hopper_kernel_says_what_it_refuses(sizes, dtype, tile, message):
    args = *operands(*sizes, dtype=dtype), jnp.ones((1, sizes[3]), jnp.int32)
    with pytest.raises(UnsupportedError, match=message):
        flash_attention.run("mosaic_gpu", *args, tile=tile, scale=1.0)
    if tile is None:  # then the reference takes over
        o, _ = flash_attention(*args, scale=1.0, target=GPU)
        assert o.shape == (*args[0].shape[:3], args[2].shape[3])
