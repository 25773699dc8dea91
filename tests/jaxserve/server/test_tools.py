"""Enforced tool calls are read back however the text is cut."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.errors import ConfigError, RequestError
from jaxserve.server.openai import Function
from jaxserve.server.parsing import Notation
from jaxserve.server.pieces import Answer, CallDelta, FirstCallOnly, Parsed, Piece
from jaxserve.server.tools import ListedCalls, NamedCall, ToolUse
from jaxserve.text.grammar import compile_grammar
from tests.jaxserve.server.fake_llm import byte_tokenizer

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


SCHEMA = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"City": {"enum": ["Oslo", "日本"]}},
}
FUNCTIONS = [
    Function(name="weather", parameters=SCHEMA, strict=True),
    Function(name="time", parameters={"type": "object", "additionalProperties": False}),
]
GOOD = '<tool_call>\n{"name": "weather", "arguments": {"city": "日本"}}\n</tool_call>'


def accepted(outputs, text):
    """Whether the constraint allows this text, and whether it may end there."""
    tokenizer = byte_tokenizer()
    matcher = compile_grammar(tokenizer, outputs).matcher()
    if not all(matcher.accept(i) for i in tokenizer.encode(text)):
        return False, False
    return True, matcher.accept(next(iter(tokenizer.eos_token_ids)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", (True, True)),
        ("No <tool> is needed, it is {fine}.\n", (True, True)),
        (f"Looking.\n{GOOD}", (True, True)),
        (f"{GOOD}\n{GOOD}\nDone.", (True, True)),
        (GOOD.replace("weather", "time").replace('"city": "日本"', ""), (True, True)),
        (GOOD.replace("日本", "Rome"), (False, False)),
        (GOOD.replace("weather", "other"), (False, False)),
        (GOOD.replace("city", "town"), (False, False)),
        (GOOD[:-3], (True, False)),
        ("<tool_call>{", (False, False)),
    ],
)
def test_strict_calls_in_free_text(text, expected):
    outputs = ToolUse.of(FUNCTIONS, "auto").constraint(Notation("hermes", None))
    assert accepted(outputs, text) == expected


def test_strict_is_refused_where_no_grammar_says_it():
    with pytest.raises(RequestError) as caught:
        ToolUse.of(FUNCTIONS, "auto").constraint(Notation("mistral", None))
    assert caught.value.param == "tools[0].function.strict"
    assert ToolUse.of(FUNCTIONS[1:], "auto").constraint(Notation("mistral", None)) is None
    with pytest.raises(RequestError, match="--tool-call-parser"):
        ToolUse.of(FUNCTIONS[1:], "auto").reader(Notation(None, None), constrained=False)


@pytest.mark.parametrize(
    ("arguments", "allowed"), [({"city": "Oslo"}, True), ({"city": "Rome"}, False), ({}, False)]
)
def test_enforced_calls_fit_their_schema(arguments, allowed):
    notation = Notation(None, None)
    named = ToolUse.of(FUNCTIONS, None, named="weather").constraint(notation)
    assert accepted(named, json.dumps(arguments)) == (allowed, allowed)
    required = ToolUse.of(FUNCTIONS, "required").constraint(notation)
    listed = [{"name": "weather", "arguments": arguments}, {"name": "time", "arguments": {}}]
    assert accepted(required, json.dumps(listed)) == (allowed, allowed)
    single = ToolUse.of(FUNCTIONS, "required", parallel=False).constraint(notation)
    assert accepted(single, json.dumps(listed)) == (False, False)
    assert accepted(single, json.dumps(listed[1:])) == (True, True)
    assert accepted(required, "[]") == (False, False)


@pytest.mark.parametrize("name", ["none", "auto", "required"])
def test_a_function_may_be_called_like_a_choice(name):
    use = ToolUse.of([Function(name=name), Function(name="other")], None, named=name)
    assert (use.forced, use.may_choose) == (True, False)
    assert len(use.for_template()) == 2
    assert accepted(use.constraint(Notation(None, None)), "{}") == (True, True)


def test_an_unknown_parser_is_refused():
    with pytest.raises(ConfigError, match="nonsense"):
        Notation.of("qwen3", "nonsense", None)
    assert Notation.of("qwen3", None, None) == Notation("hermes", "qwen3")
    assert Notation.of("qwen3", "mistral", None) == Notation("mistral", "qwen3")


def test_only_the_first_call_passes():
    class Two:
        def feed(self, text):
            return Parsed("t", "r", [CallDelta(0, "{}", "f"), CallDelta(1, "{}", "g")])

        finish = lambda self: Parsed(calls=[CallDelta(1, "x")])  # noqa: E731

    parser = FirstCallOnly(Two())
    assert parser.feed("") == Parsed("t", "r", [CallDelta(0, "{}", "f")])
    assert parser.finish() == Parsed()
