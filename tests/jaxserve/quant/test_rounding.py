"""Rounding with inputs in view: never worse than to the nearest, and better where it should be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.quant import rounding
from jaxserve.quant.rounding import (
    clipped_scale,
    compensated,
    condensed,
    nearest,
    output_error,
    plain,
    round_matrix,
    rounded_rows,
)
from jaxserve.quant.rows import dequantize_rows
from jaxserve.quant.scale_search import Product, best_scale
from jaxserve.quant.weights import round_to_int8
from kernels_pallas.quantize import quantize_rows


def drawn(seed: int, n: int, out: int, into: int) -> tuple[np.ndarray, np.ndarray]:
    """A matrix and correlated inputs with a mean, as activations have."""
    rng = np.random.default_rng(seed)
    w = rng.standard_t(4, (out, into)).astype(np.float32)
    mix = rng.normal(size=(into, into)) / into**0.5 + np.eye(into)
    return w, (rng.normal(size=(n, into)) @ mix + rng.normal(size=into)).astype(np.float32)


def error(w: np.ndarray, x: np.ndarray, **measures: bool) -> np.ndarray:
    found = round_matrix(w, x, **measures)
    return output_error(dequantize_rows(found.values, found.scale) - w, rounded_rows(x))


SIZES = st.tuples(st.integers(0, 99), st.integers(1, 80), st.integers(1, 20), st.integers(1, 150))


@settings(max_examples=30, deadline=None)
@given(SIZES, st.booleans(), st.booleans())
def test_no_row_gets_worse(sizes, clipping, compensation):
    w, x = drawn(*sizes)
    plain = error(w, x, clipping=False, compensation=False)
    found = error(w, x, clipping=clipping, compensation=compensation)
    assert (found <= plain * (1 + 1e-4) + 1e-6).all()


def test_each_measure_helps():
    w, x = drawn(0, 512, 64, 96)
    plain = error(w, x, clipping=False, compensation=False).sum()
    clipped = error(w, x, clipping=True, compensation=False).sum()
    made_good = error(w, x, clipping=False, compensation=True).sum()
    assert clipped < 0.98 * plain
    assert made_good < 0.6 * plain
    assert error(w, x).sum() <= min(clipped, made_good)


def test_compensation_reduces_the_mean_error():
    w, x = drawn(1, 512, 64, 96)
    means = []
    for compensation in (False, True):
        found = round_matrix(w, x, clipping=False, compensation=compensation)
        change = dequantize_rows(found.values, found.scale) - w
        means.append(np.abs(change @ rounded_rows(x).mean(0)).mean())
    assert means[1] < 0.3 * means[0]


def test_rows_of_exact_arithmetic_stay_exact():
    rng = np.random.default_rng(0)
    whole = rng.integers(-127, 128, (8, 32)).astype(np.float32)
    whole[:, 0] = 127
    whole[3] = 0
    found = round_matrix(whole * 0.25, rng.normal(size=(64, 32)).astype(np.float32))
    np.testing.assert_array_equal(dequantize_rows(found.values, found.scale), whole * 0.25)


def test_plain_is_what_loading_does():
    w, x = drawn(2, 8, 16, 24)
    found, want = round_matrix(w, x, clipping=False, compensation=False), round_to_int8(w)
    np.testing.assert_array_equal(found.values, want.values)
    np.testing.assert_array_equal(found.scale, want.scale)


def test_rows_are_rounded_as_the_device_rounds_them():
    x = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
    x[3] = 0
    values, scale = quantize_rows(x)
    want = np.asarray(values, np.float32) * np.asarray(scale)[:, None]
    np.testing.assert_array_equal(rounded_rows(x), want)


def test_few_rows_stand_for_many():
    w, x = drawn(3, 300, 8, 24)
    assert condensed(x).shape == (24, 24)
    np.testing.assert_allclose(output_error(w, condensed(x)), output_error(w, x), rtol=1e-3)


def test_one_scale_for_a_matrix():
    w, x = drawn(4, 64, 16, 24)
    for inputs in (None, x):
        assert len(set(round_matrix(w, inputs, per_channel=False).scale)) == 1
    assert plain(w, False).scale[0] == pytest.approx(np.abs(w).max() / 127)
    assert clipped_scale(w, x, False)[0] <= plain(w, False).scale[0]


def test_blocks_of_columns_hand_their_errors_on(monkeypatch):
    w, x = drawn(5, 256, 8, 60)
    scale = plain(w).scale
    whole = compensated(w, scale, x)
    monkeypatch.setattr(rounding, "_BLOCK", 16)
    assert np.mean(compensated(w, scale, x) == whole) > 0.98, "up to near ties"
    assert not np.array_equal(whole, nearest(w, scale))


@settings(max_examples=20, deadline=None)
@given(SIZES)
def test_a_searched_scale_is_never_worse_on_its_objective(sizes):
    w, x = drawn(*sizes)
    products = [Product(w, x), Product(w[::-1] * 3, x)]
    s = best_scale(products)
    ones = np.ones_like(s)
    assert sum(p.error(s) for p in products) <= sum(p.error(ones) for p in products) * (1 + 1e-5)


def test_an_outlier_channel_is_folded_away():
    w, x = drawn(6, 200, 32, 48)
    x[:, 5] *= 200
    w[:, 5] /= 200
    product = Product(w, x)
    assert product.error(best_scale([product])) < 0.02 * product.error(np.ones(48, np.float32))


def test_channels_that_must_share_a_scale_do():
    w, x = drawn(7, 100, 16, 24)

    def spread(a: np.ndarray) -> np.ndarray:
        pairs = a.reshape(2, 12)
        return np.broadcast_to(pairs.max(0), pairs.shape).reshape(-1)

    s = best_scale([Product(w, x)], spread).reshape(2, 12)
    np.testing.assert_array_equal(s[0], s[1])


def test_a_channel_that_is_never_used_is_left_alone():
    w, x = drawn(8, 100, 16, 24)
    x[:, 3] = 0
    w[:, 4] = 0
    s = best_scale([Product(w, x)])
    assert s[3] == s[4] == 1 and np.isfinite(s).all()
