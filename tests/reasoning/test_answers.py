"""Votes: plain, weighted, by rank, by what must be false; and when one is decided."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.protocol import Node
from reasoning.answers import (
    Answer,
    Candidate,
    LengthConfidence,
    best_of,
    is_decided,
    ranks,
    supports,
    tally,
    vote,
    winner,
)


def test_a_vote_is_the_heaviest_answer_and_its_heaviest_path():
    a, b, c = (Node(0, ((i, -1),)) for i in range(3))
    found = vote([Candidate("x", 1, a), Candidate("y", 1.5, b), Candidate("x", 2, c)])
    assert found == Answer("x", {"x": 3, "y": 1.5}, c)
    assert vote([]) == vote([Candidate(None, 9, a)]) == Answer(None)
    assert vote([Candidate("x"), Candidate("y")]).answer == "x", "the first of equals"


def test_the_best_path_wins_whatever_others_say():
    a, b = Node(0, ((0, -1),)), Node(0, ((1, -1),))
    found = best_of([Candidate("x", 1, a), Candidate("x", 1, a), Candidate("y", 1.5, b)])
    assert found == Answer("y", {"y": 1.5, "x": 1}, b)
    assert best_of([Candidate(None, 3)]) == Answer(None)
    assert best_of([Candidate("x", -1.0)]).distribution == {"x": -1.0}


def test_ranks_are_in_0_to_1_and_equals_share_theirs():
    assert ranks([10, 30, 20]) == pytest.approx([1 / 3, 1, 2 / 3])
    assert ranks([5, 5, 5]) == pytest.approx([2 / 3] * 3)
    assert ranks([]) == []


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=9))
def test_ranks_keep_order_and_mean(values: list[float]):
    found = ranks(values)
    n = len(values)
    assert all(0 < r <= 1 for r in found)
    assert sum(found) == pytest.approx((n + 1) / 2)
    for (x, r), (y, s) in product(zip(values, found, strict=True), repeat=2):
        assert (x < y) == (r < s)


@pytest.mark.parametrize("sign,first", [(1, 0.2), (-1, 0.8)])
def test_the_vote_by_length_and_confidence(sign, first: float):
    """Of two paths the first is shorter and less sure: ranks 1/2 and 1/2 of 2."""
    weights = LengthConfidence(0.6, 0.4, sign).weights([10, 20], [1.0, 2.0])
    short = 0.5 if sign == 1 else 1.0
    assert weights == pytest.approx([0.6 * short + 0.4 * 0.5, 0.6 * (1.5 - short) + 0.4])
    assert (weights[0] > weights[1]) == (sign == -1) or first == 0.8


def test_without_a_sign_confidence_decides_alone():
    assert LengthConfidence().weights([10, 20], [2.0, 1.0]) == [1.0, 0.5]
    with pytest.raises(ValueError, match="length_sign"):
        LengthConfidence(length_sign=2)  # pyright: ignore[reportArgumentType]


def test_support_is_what_must_be_false_for_an_answer_to_fall():
    known = [("x", {1, 2}), ("x", {1, 3}), ("y", {4}), ("y", {5}), ("z", {5, 1})]
    assert supports(known) == {"x": 1, "y": 2, "z": 1}, "a shared claim is one error"
    many = [("x", {1, n}) for n in range(2, 50)]
    assert supports(many) == {"x": 1}, "however often it is repeated"
    assert supports([("x", set())]) == {"x": 1} and supports([]) == {}


@given(
    st.lists(
        st.tuples(st.sampled_from("xyz"), st.frozensets(st.integers(0, 5), min_size=1)), max_size=6
    )
)
def test_support_does_not_depend_on_order_or_repetition(known):
    assert supports(known) == supports([*reversed(known), *known])


def test_decided_means_that_no_vote_to_come_can_matter():
    assert is_decided({"x": 5.0, "y": 2.0}, missing=2)
    assert not is_decided({"x": 5.0, "y": 2.0}, missing=3)
    assert not is_decided({}, missing=0)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 1)), max_size=8),
    st.lists(st.tuples(st.sampled_from("abcd"), st.floats(0, 1)), max_size=4),
)
def test_a_decided_vote_never_changes(now, later):
    before = [Candidate(*c) for c in now]
    totals = tally(before)
    if is_decided(totals, len(later)):
        assert winner(tally([*before, *(Candidate(*c) for c in later)])) == winner(totals)
