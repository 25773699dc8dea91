"""Kinds of texts: who is put together, and when."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasoning.clusters import clusters, distance, words

texts = st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=7)


def test_equal_texts_are_one_kind_and_others_are_not():
    assert clusters([(1, 2, 3), (4, 5), (1, 2, 3), (4, 5), ()], 0.05) == [0, 1, 0, 1, 2]


def test_order_of_words_counts():
    """Four words in common, and none of the pairs that they make."""
    assert distance(words((1, 2, 3, 4)), words((4, 3, 2, 1))) == pytest.approx(1 - 4 / 7)
    assert distance(words((1, 2)), words((1, 2))) == pytest.approx(0)


def test_linkage_is_of_averages():
    """The third is near the first two alike; that each is near one of the others is not enough."""
    near = [(1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 5, 7), (1, 2, 3, 4, 8, 7)]
    a, b, c = map(words, near)
    first, second, third = distance(a, b), distance(b, c), distance(a, c)
    assert first < second < third
    both = (second + third) / 2
    assert clusters(near, first - 1e-9) == [0, 1, 2]
    assert clusters(near, second) == [0, 0, 1], "single linkage would take the third one in"
    assert clusters(near, both + 1e-9) == [0, 0, 0]


@given(texts, st.floats(0, 1))
def test_kinds_are_apart_on_average(given_texts, cut):
    found = clusters(given_texts, cut)
    assert found[:1] == [0][: len(found)]
    members = [[t for t, n in zip(given_texts, found, strict=True) if n == k] for k in set(found)]
    for one, two in itertools.combinations(members, 2):
        apart = [distance(words(a), words(b)) for a in one for b in two]
        assert sum(apart) / len(apart) > cut - 1e-9
