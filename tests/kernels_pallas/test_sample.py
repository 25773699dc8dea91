"""Drawing tokens: against plain numpy in float64, and the kernel against its reference."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.draw import draw
from kernels_pallas.op import UnsupportedError
from kernels_pallas.sample import TpuTile, sample, tpu
from kernels_pallas.target import CPU, Target
from tests.kernels_pallas.simulating import on_hopper

FORMS = {
    "reference": jax.jit(draw),
    "mosaic_tpu": lambda *args: tpu(*args, tile=TpuTile(vocab=256), interpret=True),
}


def rows(scores: np.ndarray, u: np.ndarray, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The op's arguments; a number holds for every row."""
    R = len(scores)
    columns = ((temperature, np.float32), (top_k, np.int32), (top_p, np.float32))
    columns = [np.broadcast_to(np.asarray(x, t), R) for x, t in (*columns, (min_p, np.float32))]
    return tuple(
        jnp.asarray(x) for x in (scores.astype(np.float32), u.astype(np.float32), *columns)
    )


def stretch(scores: np.ndarray, token: int, temperature: float, top_k: int, top_p: float, min_p):
    """Between which numbers a token is drawn, in float64."""
    scores = scores.astype(np.float64)
    p = np.exp((scores - scores.max()) / temperature)
    p[p < min_p] = 0
    if top_k:
        p[p < np.sort(p)[-min(top_k, len(p))]] = 0
    if top_p < 1:
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= top_p * p.sum()]] = 0
    assert p[token] > 0, "the filters leave it out"
    ends = np.cumsum(p) / p.sum()
    return ends[token] - p[token] / p.sum(), ends[token]


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=8, deadline=None)
@given(
    R=st.sampled_from([1, 8, 11]),
    V=st.sampled_from([1, 2, 127, 128, 700, 1024]),
    temperature=st.sampled_from([0.3, 1.0, 5.0]),
    top_k=st.sampled_from([0, 1, 5, 10**6]),
    top_p=st.sampled_from([1e-6, 0.7, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(0, 99),
)
def test_a_token_is_where_its_number_falls(form, R, V, temperature, top_k, top_p, min_p, seed):
    rng = np.random.default_rng(seed)
    scores, u = rng.normal(size=(R, V)).astype(np.float32) * 3, rng.random(R)
    options = temperature, top_k, top_p, min_p
    tokens = np.asarray(FORMS[form](*rows(scores, u, *options)))
    for row, number, token in zip(scores, u, tokens, strict=True):
        begin, end = stretch(row, int(token), *options)
        assert begin - 2e-5 <= number <= end + 2e-5


@pytest.mark.parametrize("form", FORMS)
def test_numbers_at_both_ends_stay_inside_what_is_kept(form: str):
    """0 draws the first token that weighs anything, nearly 1 the last, hidden ones never."""
    scores = np.full((2, 900), -np.inf)
    scores[:, [17, 400, 650]] = 1.0
    tokens = FORMS[form](*rows(scores, np.array([0.0, np.nextafter(np.float32(1), 0)])))
    assert tokens.tolist() == [17, 650]


@pytest.mark.parametrize("top_k", [50, 0])
def test_numbers_at_the_borders_of_blocks_draw_nothing_that_was_removed(top_k: int):
    """Where running sums of blocks and of tokens, rounded differently, disagree by a bit."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=32768).astype(np.float32) * 3
    if not top_k:
        scores[rng.random(scores.size) < 0.9] = -1e30  # a mask
    kept = scores >= np.sort(scores)[-top_k] if top_k else scores > -1e30
    p = np.where(kept, np.exp(scores.astype(np.float64) - scores.max()), 0)
    borders = np.unique((np.cumsum(p) / p.sum())[127::128])[:-1]
    u = np.unique(np.round(borders * 2**23)[:, None] + np.arange(-3, 4)) / 2**23
    u = u[(u >= 0) & (u < 1)][:1024]
    tokens = FORMS["reference"](
        *rows(np.broadcast_to(scores, (len(u), scores.size)), u, top_k=top_k)
    )
    assert kept[np.asarray(tokens)].all()


@pytest.mark.parametrize("form", FORMS)
def test_a_share_too_small_for_a_float_keeps_the_most_likely(form: str):
    scores = np.random.default_rng(0).normal(size=(3, 300))
    tokens = FORMS[form](
        *rows(scores, np.array([0.1, 0.5, 0.9]), top_p=np.float32([1e-37, 1e-45, 0]))
    )
    assert tokens.tolist() == scores.argmax(-1).tolist()


@pytest.mark.parametrize("form", FORMS)
def test_ties_with_the_last_that_is_kept_stay(form: str):
    scores = np.zeros((64, 300))
    scores[:, 250:] = 2.0
    tokens = FORMS[form](*rows(scores, np.arange(64) / 64, top_k=1))
    assert set(np.asarray(tokens).tolist()) == {250 + 50 * i // 64 for i in range(64)}


@pytest.mark.parametrize("form", FORMS)
def test_a_row_that_is_not_finite_disturbs_no_other(form: str):
    rng = np.random.default_rng(0)
    scores, u = rng.normal(size=(4, 300)), rng.random(4)
    clean = FORMS[form](*rows(scores, u, top_k=9, top_p=0.9))
    scores[1, 7], scores[2] = np.nan, -np.inf
    tokens = FORMS[form](*rows(scores, u, top_k=9, top_p=0.9))
    assert tokens[0] == clean[0] and tokens[3] == clean[3]
    assert int(tokens.min()) >= 0 and int(tokens.max()) < 300


def check_all_kinds(V, draw):
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
    tokens = np.asarray(draw(*rows(scores, u, temperature, top_k, top_p, min_p))).tolist()
    assert tokens[:2] == [17, V - 1]
    assert tokens[2:6] == [V - 50 + 50 * i // 4 for i in range(4)]
    assert min(tokens) >= 0 and max(tokens) < V
    for r in range(8, 16):
        options = max(temperature[r], 1e-6), top_k[r], top_p[r], min_p[r]
        begin, end = stretch(scores[r], tokens[r], *options)
        assert begin - 2e-5 <= u[r] <= end + 2e-5


@pytest.mark.slow
def test_rows_of_all_kinds_on_hopper():
    """In one simulation."""
    check_all_kinds(900, lambda *args: on_hopper(partial(sample.run, "mosaic_gpu", *args)))


def test_what_hopper_refuses():
    for shape, dtype, message in (
        ((2, 401), jnp.float32, "V=401 must be a multiple of 4"),
        ((2, 40), jnp.float32, "V=40 must be .* from 128 on"),
        ((2, 400), jnp.bfloat16, "bfloat16, and must be float32"),
    ):
        scores, column = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((2,), jnp.float32)
        counts = jax.ShapeDtypeStruct((2,), jnp.int32)
        with pytest.raises(UnsupportedError, match=message):
            jax.eval_shape(
                lambda *args: sample.run("mosaic_gpu", *args),
                scores, column, column, counts, column, column,
            )  # fmt: skip


def test_the_chooser_falls_back_and_the_kernel_says_what_it_refuses():
    args = rows(np.zeros((2, 40)), np.array([0.1, 0.9]))
    assert sample(*args, target=CPU).tolist() == [4, 36]
    half = args[0].astype(jnp.bfloat16), *args[1:]
    with pytest.raises(UnsupportedError, match="bfloat16, and must be float32"):
        sample(*half, target=Target("tpu", "v6e"), implementation="mosaic_tpu")
