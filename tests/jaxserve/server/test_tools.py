"""Enforced tool calls are read back however the text is cut."""

import json
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.server.pieces import Answer, CallDelta, FirstCallOnly, Parsed, Piece
from jaxserve.server.tools import ListedCalls, NamedCall

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('{}[]",:\\ab é☃', max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
calls = st.lists(
    st.tuples(
        st.sampled_from(["f", "g"]), st.dictionaries(st.text(max_size=3), values, max_size=3)
    ),
    min_size=1,
    max_size=4,
)


def cut(text, places):
    """`text` in pieces."""
    edges = sorted({0, len(text), *(p % (len(text) + 1) for p in places)})
    return [text[a:b] for a, b in pairwise(edges)]


def read(parser, pieces):
    """What an answer holds after these texts."""
    answer = Answer(0)
    for text in pieces:
        answer.add(Piece(0, calls=parser.feed(text).calls))
    answer.add(Piece(0, calls=parser.finish().calls))
    return [(call.name, json.loads(call.arguments)) for call in answer.calls]


@given(calls, st.lists(st.integers(0, 500), max_size=8), st.sampled_from([None, 2]))
def test_listed_calls(wanted, places, indent):
    text = json.dumps([{"name": n, "arguments": a} for n, a in wanted], indent=indent)
    assert read(ListedCalls(), cut(text, places)) == wanted


@given(st.dictionaries(st.text(max_size=3), values, max_size=3), st.lists(st.integers(0, 500)))
def test_a_named_call(arguments, places):
    assert read(NamedCall("f"), cut(json.dumps(arguments), places)) == [("f", arguments)]


def test_a_list_that_is_cut_off_keeps_its_whole_calls():
    text = '[{"name": "f", "arguments": {"a": "}"}}, {"name": "g", "argum'
    assert read(ListedCalls(), [text]) == [("f", {"a": "}"})]


def test_only_the_first_call_passes():
    class Two:
        def feed(self, text):
            return Parsed("t", "r", [CallDelta(0, "{}", "f"), CallDelta(1, "{}", "g")])

        finish = lambda self: Parsed(calls=[CallDelta(1, "x")])  # noqa: E731

    parser = FirstCallOnly(Two())
    assert parser.feed("") == Parsed("t", "r", [CallDelta(0, "{}", "f")])
    assert parser.finish() == Parsed()
