"""Enforced tool calls are read back however the text is cut."""

import json
from itertools import pairwise

import numpy as np
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.errors import ConfigError, RequestError
from jaxserve.server.openai import Function
from jaxserve.server.parsing import Notation
from jaxserve.server.pieces import Answer, CallDelta, FirstCallOnly, Parsed, Piece
from jaxserve.server.tools import ListedCalls, NamedCall, ToolUse
from jaxserve.text.detokenize import Detokenizer
from jaxserve.text.grammar import compile_grammar
from jaxserve.text.tokenizer import TAGS, Tokenizer
from tests.jaxserve.server.fake_llm import FakeLLM, byte_tokenizer
from tests.jaxserve.server.live_server import LiveServer

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


@settings(deadline=None)
@given(calls, st.lists(st.integers(0, 500), max_size=8), st.sampled_from([None, 2]))
def test_listed_calls(wanted, places, indent):
    text = json.dumps([{"name": n, "arguments": a} for n, a in wanted], indent=indent)
    assert read(ListedCalls(), cut(text, places)) == wanted


@settings(deadline=None)
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


def tagged_tokenizer(special):
    """As Qwen's and Hermes' have it: every tag is one token."""
    plain = byte_tokenizer()
    add = plain.backend.add_special_tokens if special else plain.backend.add_tokens
    add(list(TAGS))
    return Tokenizer(plain.backend, special_tokens=plain.special_tokens)


TOKENIZERS = {
    "spelled": byte_tokenizer(),
    "added": tagged_tokenizer(False),
    "special": tagged_tokenizer(True),
}


def accepted(outputs, text, tokenizer=TOKENIZERS["spelled"], spelled=False):
    """Whether the constraint allows this text, and whether it may end there."""
    pieces = text if spelled else [text]
    ids = [i for piece in pieces for i in tokenizer.encode(piece)]
    matcher = compile_grammar(tokenizer, outputs).matcher()
    for i in ids:
        mask = np.zeros(-(-tokenizer.vocab_size // 32), np.uint32)
        matcher.fill(mask)
        permitted = bool(mask[i // 32] >> i % 32 & 1)
        assert matcher.accept(i) == permitted
        if not permitted:
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
        (GOOD.removesuffix("</tool_call>"), (True, False)),
        ("<tool_call>{", (False, False)),
        ("Well, <tool_call>", (True, False)),
        ("<tool_call><tool_call>", (False, False)),
        (f"{GOOD}<tool_call>{{", (False, False)),
    ],
)
@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("spelled", [False, True])
def test_strict_calls_in_free_text(kind, spelled, text, expected):
    outputs = ToolUse.of(FUNCTIONS, "auto").constraint(Notation("hermes", None))
    assert accepted(outputs, text, TOKENIZERS[kind], spelled) == expected


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("spelled", [False, True])
def test_calls_and_reasoning_are_read_from_tags_of_either_kind(kind, spelled):
    tokenizer, use = TOKENIZERS[kind], ToolUse.of(FUNCTIONS, "auto")
    written = f"<think>Rain?</think>I look.\n{GOOD}"
    ids = [i for piece in (written if spelled else [written]) for i in tokenizer.encode(piece)]
    reader = use.reader(Notation("hermes", "qwen3"), constrained=False)
    text = Detokenizer(tokenizer, skip_special_tokens=not reader.needs_special_tokens)
    parser, answer = reader.make(None), Answer(0)
    for parsed in (parser.feed(text.push(ids)), parser.finish()):
        answer.add(Piece(0, parsed.text, parsed.reasoning, parsed.calls))
    assert (answer.reasoning, answer.text) == ("Rain?", "I look.")
    assert [(c.name, json.loads(c.arguments)) for c in answer.calls] == [
        ("weather", {"city": "日本"})
    ]


@pytest.mark.parametrize("parallel", [True, False])
def test_strict_calls_may_be_one_or_many(parallel):
    use = ToolUse.of(FUNCTIONS, "auto", parallel=parallel)
    outputs = use.constraint(Notation("hermes", None))
    tagged = TOKENIZERS["added"]
    assert accepted(outputs, GOOD, tagged) == (True, True)
    assert accepted(outputs, f"{GOOD}\n{GOOD}", tagged) == (parallel, parallel)


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


def test_a_template_of_xml_calls_chooses_its_parser_unless_one_is_named():
    assert Notation.of("qwen3", None, None, XML) == Notation("qwen3_coder", "qwen3")
    assert Notation.of("qwen3", "hermes", None, XML) == Notation("hermes", "qwen3")
    with pytest.raises(RequestError, match="strict=true cannot be honoured"):
        ToolUse.of(FUNCTIONS, "auto").constraint(Notation("qwen3_coder", None))


XML = """\
{%- for tool in tools or [] %}{{ tool | tojson }}
{% endfor -%}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}
{%- for call in m.tool_calls or [] %}
<tool_call>
<function={{ call.function.name }}>
{% for key, value in call.function.arguments | items %}<parameter={{ key }}>
{{ value if value is string else value | tojson }}
</parameter>
{% endfor %}</function>
</tool_call>
{%- endfor %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""


@pytest.fixture(scope="module")
def coder():
    """A client of a server whose model writes calls in XML."""
    llm = FakeLLM()
    llm.tokenizer.chat_templates["default"] = XML
    with (
        LiveServer(llm) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield llm, client


@pytest.mark.parametrize("stream", [False, True])
def test_xml_calls_are_served_with_the_types_of_their_tools(coder, stream):
    llm, client = coder
    schema = {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
    tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
    user = {"role": "user", "content": "hi"}
    asked = {"model": "fake/model", "messages": [user], "tools": [tool]}
    written = (
        "<tool_call>\n<function=weather>\n<parameter=city>\n7\n</parameter>\n"
        "<parameter=days>\n7\n</parameter>\n</function>\n</tool_call>"
    )
    llm.script = lambda prompt: f"I look.\n{written}\n{written}"
    if stream:
        chunks = [c.choices[0] for c in client.chat.completions.create(**asked, stream=True)]
        content = "".join(c.delta.content or "" for c in chunks)
        calls = [call for c in chunks for call in c.delta.tool_calls or ()]
        reason = chunks[-1].finish_reason
    else:
        choice = client.chat.completions.create(**asked).choices[0]
        content, calls = choice.message.content, choice.message.tool_calls
        reason = choice.finish_reason
    assert (content, reason) == ("I look.", "tool_calls")
    assert [c.function.name for c in calls] == ["weather"] * 2
    assert [json.loads(c.function.arguments) for c in calls] == [{"city": "7", "days": 7}] * 2
    said = {"role": "assistant", "content": "", "tool_calls": [calls[0].model_dump()]}
    answer = {"role": "tool", "tool_call_id": calls[0].id, "content": "rain"}
    client.chat.completions.create(**asked | {"messages": [user, said, answer]})
    assert written in llm.submitted[-1][0]  # the template wrote what was read


def test_only_the_first_call_passes():
    class Two:
        def feed(self, text):
            return Parsed("t", "r", [CallDelta(0, "{}", "f"), CallDelta(1, "{}", "g")])

        finish = lambda self: Parsed(calls=[CallDelta(1, "x")])  # noqa: E731

    parser = FirstCallOnly(Two())
    assert parser.feed("") == Parsed("t", "r", [CallDelta(0, "{}", "f")])
    assert parser.finish() == Parsed()
