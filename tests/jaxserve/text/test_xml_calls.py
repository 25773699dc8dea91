"""Qwen3-Coder's calls: XML around plain text, typed by the tools' schemas."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.text.parsers import Content, ToolCall, make_parser, parsers_of
from jaxserve.text.parsers.xml_calls import read_xml, typed

SCHEMAS = {
    "write": {
        "type": "object",
        "properties": {
            "path": {"type": "string"},
            "text": {"type": "string"},
            "mode": {"type": "integer"},
            "force": {"type": "boolean"},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
    },
    "rest": {"type": "object", "additionalProperties": {"type": "number"}},
}


def parameter(name, value):
    return f"<parameter={name}>\n{value}\n</parameter>\n"


def call(name, **values):
    """A call as the model's template writes it."""
    body = "".join(parameter(key, value) for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


def parse(text, pieces=None, schemas=SCHEMAS):
    """Content in one, and calls by name and arguments, in order."""
    parser = make_parser("qwen3_coder", schemas=schemas)
    events = [e for piece in pieces or [text] for e in parser.push(piece)] + parser.finish()
    found = []
    for event in events:
        match event:
            case ToolCall(index, _, name, arguments):
                assert index == sum(not isinstance(e, str) for e in found)
                found.append((name, json.loads(arguments)))
            case Content(text) if found and isinstance(found[-1], str):
                found[-1] += text
            case Content(text):
                found.append(text)
    return found


WRITE = call("write", path="a b.py", text="def f():\n    return 1\n", mode="7", force="true")
WRITTEN = (
    "write",
    {"path": "a b.py", "text": "def f():\n    return 1\n", "mode": 7, "force": True},
)
TAGS = "x</parameter>\n<function=g>\n<b>\n</function>\nno </tool_ call>"
CASES = [
    (WRITE, [WRITTEN]),
    (f"I write.\n{WRITE}\n{WRITE}\nDone.", ["I write.", WRITTEN, WRITTEN, "Done."]),
    (call("write"), [("write", {})]),
    (call("other", n="5"), [("other", {"n": "5"})]),
    (call("write", unknown="5"), [("write", {"unknown": "5"})]),
    (call("rest", a="5", b="x"), [("rest", {"a": 5, "b": "x"})]),
    (call("write", text=""), [("write", {"text": ""})]),
    (call("write", text="\n\n a \n"), [("write", {"text": "\n\n a \n"})]),
    (call("write", text=TAGS), [("write", {"text": TAGS})]),
    ("<tool_call><function=write><parameter=mode>7</parameter></function></tool_call>", None),
    # two functions under one mark, the first mark missing, and the last
    (call("write", mode="7").replace("\n</tool_call>", "") + WRITE.removeprefix("<tool_call>"), 2),
    ("Now.\n" + WRITE.removeprefix("<tool_call>\n") + "\nDone.", ["Now.", WRITTEN, "Done."]),
    (WRITE.removesuffix("\n</tool_call>"), [WRITTEN]),
    # closing tags that the model forgot
    (WRITE.replace("\n</function>", ""), [WRITTEN]),
    (WRITE.replace("\n</parameter>", ""), [WRITTEN]),
    # no calls
    ("Use <tool_call> and <function=", ["Use <tool_call> and <function="]),
    ('<tool_call>{"name": "write", "arguments": {}}</tool_call> so', "all"),
    ("<tool_call>\n<function=write>\nwords\n</function>\n</tool_call>", "all"),
    ("<tool_call>\n<function=write\n</function>\n</tool_call>", "all"),
    (f"{WRITE[:-30]}", "all"),
    (WRITE[: WRITE.index("<parameter=force>")], "all"),
    ("a < b <tool", ["a < b <tool"]),
]


@pytest.mark.parametrize(("text", "expected"), CASES)
def test_the_whole_text_and_character_by_character(text, expected):
    match expected:
        case "all":
            expected = [text]
        case None:
            expected = [("write", {"mode": 7})]
        case 2:
            expected = [("write", {"mode": 7}), WRITTEN]
    assert parse(text) == expected
    assert parse(text, list(text)) == expected


def test_a_call_is_handed_out_before_the_text_ends():
    parser = make_parser("qwen3_coder", schemas=SCHEMAS)
    assert parser.push("I look. <tool") == [Content("I look.")]
    (event,) = parser.push(WRITE.removeprefix("<tool"))
    assert (event.name, json.loads(event.arguments_delta)) == WRITTEN


def nullable(kind):
    return {"anyOf": [{"type": kind}, {"type": "null"}]}


ROOT = {"$defs": {"Days": {"type": "integer"}, "Loop": {"$ref": "#/$defs/Loop"}}}
TYPED = [
    ("5", {"type": "string"}, "5"),
    ("null", {"type": "string"}, "null"),
    ("null", nullable("string"), None),
    ("None", {"type": ["string", "null"]}, None),
    ("5", nullable("string"), "5"),
    ("5", {"type": "integer"}, 5),
    ("5.0", {"type": "integer"}, 5),
    (" -5 ", {"type": "integer"}, -5),
    ("5.5", {"type": "integer"}, "5.5"),
    ("five", {"type": "integer"}, "five"),
    ("true", {"type": "integer"}, "true"),
    ("null", {"type": "integer"}, None),
    ("5", {"type": "number"}, 5),
    ("1e3", {"type": "number"}, 1000),
    ("0.5", {"type": "number"}, 0.5),
    ("NaN", {"type": "number"}, "NaN"),
    ("1e999", {"type": "number"}, "1e999"),
    ("9" * 5000, {"type": "integer"}, "9" * 5000),
    ("True", {"type": "boolean"}, True),
    ("FALSE", {"type": "boolean"}, False),
    ("yes", {"type": "boolean"}, "yes"),
    ('[1, "a"]', {"type": "array"}, [1, "a"]),
    ("['a', None, True]", {"type": "array"}, ["a", None, True]),
    ('{"a": {"b": []}}', {"type": "object"}, {"a": {"b": []}}),
    ("{'a': 1}", {"type": "object"}, {"a": 1}),
    ("\"{'a': 1}\"", {"type": "object"}, {"a": 1}),
    ("{1, 2}", {"type": "array"}, "{1, 2}"),
    ("[{1, 2}]", {"type": "array"}, "[{1, 2}]"),
    ("[NaN]", {"type": "array"}, "[NaN]"),
    ("b'x'", {"type": "string"}, "b'x'"),
    ("[" * 5000, {"type": "array"}, "[" * 5000),
    ("-" * 9000 + "1", {"type": "array"}, "-" * 9000 + "1"),
    ("[1]", {"type": "object"}, "[1]"),
    ("[1]", {"anyOf": [{"type": "string"}, {"type": "array"}]}, [1]),
    ("x", {"oneOf": [{"type": "string"}, {"type": "integer"}]}, "x"),
    ("7", {"$ref": "#/$defs/Days"}, 7),
    ("7", {"$ref": "#/$defs/Loop"}, "7"),
    ("7", {"$ref": "#/$defs/Missing/deep"}, "7"),
    ("7", {"allOf": [{"$ref": "#/$defs/Days"}]}, 7),
    ("2", {"enum": [1, 2]}, 2),
    ("2", {"enum": ["1", "2"]}, "2"),
    ("2", {"const": 2}, 2),
    ("2", {"type": "int"}, 2),
    ("{}", {"type": "dict"}, {}),
    ("5", {}, "5"),
    ("5", True, "5"),
    ("5", None, "5"),
    ("null", {}, "null"),
]


@pytest.mark.parametrize(("text", "schema", "expected"), TYPED)
def test_values_are_typed_by_their_schema(text, schema, expected):
    found = typed(text, schema, ROOT)
    assert (found, type(found)) == (expected, type(expected))
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    "schema", [{"type": 5}, {"enum": []}, {"anyOf": [3, None]}, {"type": [[]]}]
)
def test_a_schema_that_makes_no_sense_is_no_obstacle(schema):
    assert typed("5", schema) == "5"


values = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False, width=32)
)
values |= st.text() | st.lists(st.integers(), max_size=3) | st.dictionaries(st.text(), st.none())
NAMES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array"}
NAMES |= {dict: "object", type(None): "null"}


@given(st.dictionaries(st.sampled_from("abcd"), values), st.data())
@settings(deadline=None)
def test_what_the_template_writes_is_read_back(arguments, data):
    schema = {"properties": {k: {"type": NAMES[type(v)]} for k, v in arguments.items()}}
    written = {k: v if isinstance(v, str) else json.dumps(v) for k, v in arguments.items()}
    text = f"So.\n{call('f', **written)}"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    assert parse(text, pieces, {"f": schema}) == ["So.", ("f", arguments)]


def test_many_marks_take_no_longer_than_their_number():
    for text in ("<function=" * 30_000, "<parameter=a>" * 30_000, "</parameter>x " * 30_000):
        body = f"<tool_call><function=f>\n<parameter=x>{text}</tool_call>"
        assert read_xml(body, {}) is None


def test_the_template_tells_it_from_qwen3():
    template = "{{ '<function=' + f.name + '>' }} ... {{ '<parameter=' + k + '>' }}"
    assert parsers_of("qwen3_moe", template) == ("qwen3_coder", "qwen3")
    assert parsers_of("qwen3_moe", "<tool_call>{{ call | tojson }}</tool_call>")[0] == "hermes"
    assert parsers_of("qwen3_moe")[0] == "hermes"
    assert parsers_of("llama", "<function={{ name }}>{{ json }}</function>")[0] == "llama3_json"
