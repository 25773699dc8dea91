"""What a grammar permits is exactly what it describes, and nothing that is sent can hurt it."""

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.errors import RequestError
from jaxserve.request import StructuredOutputs
from jaxserve.text import grammar
from jaxserve.text.grammar import Matcher, compile_grammar
from jaxserve.text.grammar_rehearsal import Rehearsal
from jaxserve.text.tokenizer import Tokenizer

from .conftest import BUILDERS

EOS = {"byte_level": ["<|end|>", "<|im_end|>"], "llama": ["</s>"], "gemma": ["</s>"]}


def with_eos(kind: str) -> Tokenizer:
    backend = BUILDERS[kind]()
    return Tokenizer(backend, eos_token_ids=[backend.token_to_id(t) for t in EOS[kind]])


TOKENIZERS = {kind: with_eos(kind) for kind in EOS}
BYTE_LEVEL = TOKENIZERS["byte_level"]


def permitted(matcher: Matcher, vocab_size: int, dtype: type = np.uint32) -> set[int]:
    mask = np.full(-(-vocab_size // 32), -1).astype(dtype)
    matcher.fill(mask)
    bits = np.unpackbits(mask.astype(np.uint32).view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def walk(tokenizer: Tokenizer, outputs: StructuredOutputs, seed: int, steps: int) -> str | None:
    """The text of a random permitted walk; None if it did not end within so many steps."""
    rng = random.Random(seed)
    matcher, ids = compile_grammar(tokenizer, outputs).matcher(), []
    for _ in range(steps):
        choices = permitted(matcher, tokenizer.vocab_size)
        token = rng.choice(sorted(choices & tokenizer.eos_token_ids or choices))
        assert matcher.accept(token)
        if token in tokenizer.eos_token_ids:
            return tokenizer.token_bytes.join(ids, False, at_start=False).decode()
        ids.append(token)
    return None


def is_trip(value) -> bool:
    return (
        value.keys() == {"city", "days"}
        and value["city"] in ("Paris", "日本")
        and isinstance(value["days"], int)
    )


def is_nest(value) -> bool:
    return value is None or (
        isinstance(value, list) and len(value) < 2 and all(map(is_nest, value))
    )


TRIP = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "日本"]}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
BOOLEANS = {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3}
NEST = {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#"}, "maxItems": 1}]}
SCHEMAS = [
    (TRIP, is_trip),
    (BOOLEANS, lambda v: 2 <= len(v) <= 3 and all(isinstance(x, bool) for x in v)),
    ({"type": "string", "maxLength": 4}, lambda v: isinstance(v, str) and len(v) <= 4),
    ({"oneOf": [{"const": "a"}, {"type": "null"}]}, lambda v: v in ("a", None)),
    ({"type": "integer", "minimum": 7, "maximum": 120}, lambda v: 7 <= v <= 120),
    (NEST, is_nest),
]


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
@pytest.mark.parametrize("as_text", [True, False])
def test_every_completed_walk_satisfies_its_schema(kind, as_text):
    for schema, holds in SCHEMAS:
        outputs = StructuredOutputs(json=json.dumps(schema) if as_text else schema)
        texts = [walk(TOKENIZERS[kind], outputs, seed, steps=60) for seed in range(8)]
        completed = [json.loads(text) for text in texts if text is not None]
        assert completed, schema
        assert all(map(holds, completed)), (schema, completed)


def test_json_object_is_any_object():
    texts = [walk(BYTE_LEVEL, StructuredOutputs(json_object=True), seed, 200) for seed in range(20)]
    completed = [json.loads(text) for text in texts if text is not None]
    assert completed
    assert all(isinstance(value, dict) for value in completed)


@given(
    st.sampled_from(sorted(TOKENIZERS)),
    st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=6), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
@settings(deadline=None, max_examples=40)
def test_choice_permits_what_goes_on_to_a_choice(kind, choices, rng):
    tokenizer = TOKENIZERS[kind]
    pieces = tokenizer.token_bytes.table(skip_special_tokens=True)
    targets = [choice.encode() for choice in choices]
    matcher = compile_grammar(tokenizer, StructuredOutputs(choice=choices)).matcher()
    written = b""
    while not matcher.finished:
        possible = {
            i
            for i in range(tokenizer.vocab_size)
            if pieces[i] and any(target.startswith(written + pieces[i]) for target in targets)
        }
        expected = possible | (tokenizer.eos_token_ids if written in targets else set())
        found = permitted(matcher, tokenizer.vocab_size)
        assert found - tokenizer.eos_token_ids <= possible
        assert found & tokenizer.eos_token_ids == expected & tokenizer.eos_token_ids
        # Of several spellings of the only way on, llguidance may leave just the tokenizer's own.
        assert {pieces[i][:1] for i in found} == {pieces[i][:1] for i in expected}
        refused = rng.randrange(tokenizer.vocab_size)
        assert refused in expected or not matcher.accept(refused)
        token = rng.choice(sorted(found & possible))
        assert matcher.accept(token)
        written += pieces[token]
    assert written in targets


def test_regex_matches_the_whole_text():
    texts = {
        walk(BYTE_LEVEL, StructuredOutputs(regex=r"[ab]{2}/\d"), seed, 20) for seed in range(20)
    }
    assert None not in texts
    assert all(t[0] in "ab" and t[1] in "ab" and t[2] == "/" and t[3:].isdigit() for t in texts)
    assert len(texts) > 3


def test_a_lark_grammar():
    outputs = StructuredOutputs(grammar='start: "(" start ")" | "x"')
    texts = {walk(BYTE_LEVEL, outputs, seed, 40) for seed in range(10)} - {None}
    assert texts
    assert all(t == "(" * t.count("(") + "x" + ")" * t.count("(") for t in texts)


def test_the_end_is_permitted_just_where_the_grammar_may_end():
    matcher = compile_grammar(BYTE_LEVEL, StructuredOutputs(regex="a{1,2}")).matcher()
    a = BYTE_LEVEL.encode("a")[0]
    eos = BYTE_LEVEL.eos_token_ids
    assert len(eos) == 2
    assert permitted(matcher, BYTE_LEVEL.vocab_size) & eos == set()
    assert not matcher.accept(min(eos))
    assert matcher.accept(a)
    assert permitted(matcher, BYTE_LEVEL.vocab_size) & eos == eos
    assert not matcher.finished
    ended = matcher.fork()
    assert ended.accept(max(eos))
    assert ended.finished
    assert matcher.accept(a)
    assert matcher.finished
    assert permitted(matcher, BYTE_LEVEL.vocab_size) == eos
    assert not matcher.accept(a)


@pytest.mark.parametrize("dtype", [np.int32, np.uint32])
@pytest.mark.parametrize("padding", [-40, 0, 1, 31, 32, 1000])
def test_the_model_s_vocabulary_may_have_another_size(dtype, padding):
    matcher = compile_grammar(BYTE_LEVEL, StructuredOutputs(regex="(.|\n)*")).matcher()
    size = BYTE_LEVEL.vocab_size
    found = permitted(matcher, size + padding, dtype)
    words = 32 * -(-(size + padding) // 32)
    assert found == {i for i in permitted(matcher, size) if i < words}
    assert max(found) < size
    assert matcher.accept(BYTE_LEVEL.encode("a")[0])
    assert not any(matcher.accept(i) for i in (size, size + 1000, -1, 2**40))


def test_a_fork_goes_its_own_way():
    matcher = compile_grammar(BYTE_LEVEL, StructuredOutputs(choice=["ab", "ac"])).matcher()
    a, b, c = (BYTE_LEVEL.backend.token_to_id(x) for x in "abc")
    assert matcher.accept(a)
    fork = matcher.fork()
    assert fork.accept(b)
    assert fork.finished
    assert not matcher.finished
    assert matcher.accept(c)


TAGGED = BUILDERS["byte_level"]()
TAGGED.add_tokens(["<h1>"])
TAGGED.add_special_tokens(["<|x|>"])
TAGGED = Tokenizer(TAGGED, eos_token_ids=[TAGGED.token_to_id("<|end|>")])


@pytest.mark.parametrize("name", ["<think>", "</tool_call>", "<h1>", "<|x|>", "<|end|>"])
@pytest.mark.parametrize("around", ["", "a"])
def test_the_name_of_a_token_is_spelled_where_it_is_text(name, around):
    text = f"{around}{name}{around}"
    for outputs in (
        StructuredOutputs(choice=[text]),
        StructuredOutputs(json={"const": text}),
        StructuredOutputs(grammar=f"start: {json.dumps(text)}"),
    ):
        found = walk(TAGGED, outputs, 0, 40)
        assert found == (json.dumps(text) if outputs.json else text)


def test_a_token_that_is_named_may_come_as_one():
    outputs = StructuredOutputs(grammar='start: "a" <think> "b"')
    ids = [BYTE_LEVEL.backend.token_to_id(t) for t in ("a", "<think>", "b")]
    matcher = compile_grammar(BYTE_LEVEL, outputs).matcher()
    for i in ids:
        assert permitted(matcher, BYTE_LEVEL.vocab_size) == {i}
        assert matcher.accept(i)
    with pytest.raises(RequestError, match="unknown special token"):
        compile_grammar(TOKENIZERS["llama"], outputs)


def test_a_tag_that_is_no_token_leaves_the_other_alternatives():
    outputs = StructuredOutputs(grammar='start: tag\ntag: "<think>"\n| <think>')
    assert walk(TOKENIZERS["llama"], outputs, 0, 20) == "<think>"
    think = BYTE_LEVEL.backend.token_to_id("<think>")
    assert think in permitted(compile_grammar(BYTE_LEVEL, outputs).matcher(), BYTE_LEVEL.vocab_size)


def test_the_same_grammar_is_compiled_once(monkeypatch):
    outputs = StructuredOutputs(regex="once[0-9]")
    first = compile_grammar(BYTE_LEVEL, outputs)
    monkeypatch.setattr(grammar, "_rehearsal", None)
    assert compile_grammar(BYTE_LEVEL, StructuredOutputs(regex="once[0-9]")) is first


def test_another_kind_of_tokenizer():
    backend = BUILDERS["word_level"]()
    tokenizer = Tokenizer(backend, eos_token_ids=[backend.token_to_id("[EOS]")])
    outputs = StructuredOutputs(choice=[" the lazy fox"])
    assert walk(tokenizer, outputs, 0, 10) == " the lazy fox"
    with pytest.raises(RequestError, match="no token of the vocabulary"):
        compile_grammar(tokenizer, StructuredOutputs(json_object=True))


@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        ({"json": '{"type":'}, "JSON"),
        ({"json": '{"type": "banana"}'}, "banana"),
        ({"json": {"type": "string", "format": "nope"}}, "nope"),
        ({"json": {"type": {1, 2}}}, "set"),
        ({"regex": "["}, "unclosed"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"grammar": "start: missing"}, "missing"),
        ({"grammar": "start: start"}, "no token"),
        ({"choice": [1, 2]}, "strings"),
        ({"regex": "[a-z" + "z" * 500}, "…$"),
        ({"regex": "a" * 300_000}, "262144"),
    ],
)
def test_a_fault_is_named(outputs, names):
    with pytest.raises(RequestError, match=names) as raised:
        compile_grammar(BYTE_LEVEL, StructuredOutputs(**outputs))
    assert raised.value.param == "structured_outputs"
    assert len(str(raised.value)) < 600


def test_no_eos_is_a_fault():
    with pytest.raises(RequestError, match="eos"):
        compile_grammar(Tokenizer(BUILDERS["byte_level"]()), StructuredOutputs(regex="a"))


# ---- strangers -------------------------------------------------------------------------------


def chain(n: int, link) -> dict:
    """Definitions that each need the next."""
    links = {f"d{i}": link({"$ref": f"#/$defs/d{i + 1}"}) for i in range(n)}
    return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{n}": {"type": "null"}}}


def nested(n: int) -> dict:
    schema: dict = {}
    for _ in range(n):
        schema = {"items": schema}
    return schema


def rules(n: int, name: str) -> str:
    """A grammar in which each rule is the next."""
    chained = "\n".join(f"{name}{i}: {name}{i + 1}" for i in range(n))
    return f'start: {name}0\n{chained}\n{name}{n}: "x"'


def required(schema: dict) -> dict:
    return {"type": "object", "properties": {"a": schema}, "required": ["a"]}


def twice(schema: dict) -> dict:
    return {"type": "object", "properties": {"l": schema, "r": schema}}


def patterns(n: int) -> dict:
    return {"type": "object", "patternProperties": {f"^k{i}_[a-z]+$": {} for i in range(n)}}


HOSTILE = {
    "rules": {"grammar": rules(9000, "a")},
    "terminals": {"grammar": rules(9000, "A")},
    "references": {"json": chain(5000, required)},
    "doubling": {"json": chain(40, twice)},
    "intersection": {"json": {"allOf": [{"pattern": f"a.*{i}"} for i in range(60)]}},
    "multiple": {"json": {"type": "integer", "multipleOf": 9999991}},
    "disjoint": {"json": patterns(1500)},
    "loop": {"json": {"$ref": "#"}},
    "nested": {"json": nested(90)},
    "very nested": {"json": nested(5000)},
    "nested text": {"json": '{"items":' * 10_000 + "{}" + "}" * 10_000},
    "repeat": {"regex": "(((a{0,999}){0,999}){0,999}){0,999}"},
    "groups": {"regex": "(" * 10_000 + "a" + ")" * 10_000},
    "brackets": {"grammar": "start: " + "(" * 10_000 + '"a"' + ")" * 10_000},
    "ambiguous": {"grammar": "start: e\ne: e e e | e e | /[a-z ]+/ | "},
    "huge": {"json": {"type": "array", "minItems": 10**9}},
    "surrogate": {"choice": ["\ud800"]},
    "remote": {"json": {"$ref": "http://localhost:1/x"}},
    "named": {"grammar": f"start: <|end|> | x\nx: %json {json.dumps(patterns(1500))}"},
    "numbered": {"grammar": f"start: <[400]> | x\nx: %json {json.dumps(patterns(1500))}"},
}


def outcome(outputs: dict) -> tuple[str, float]:
    start = time.perf_counter()
    try:
        matcher = compile_grammar(BYTE_LEVEL, StructuredOutputs(**outputs)).matcher()
        for _ in range(3):
            matcher.accept(min(permitted(matcher, BYTE_LEVEL.vocab_size)))
        answer = "matcher"
    except RequestError as error:
        assert error.param == "structured_outputs"
        answer = "refused"
    return answer, time.perf_counter() - start


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(grammar, "_rehearsal", Rehearsal(cpu_seconds=0.1))


def test_hostile_grammars_are_refused_or_served_in_bounded_time(impatient):
    with ThreadPoolExecutor(16) as pool:
        found = dict(zip(HOSTILE, pool.map(outcome, HOSTILE.values()), strict=True))
    assert max(seconds for _, seconds in found.values()) < 10
    refused = {name for name, (answer, _) in found.items() if answer == "refused"}
    lethal = {"rules", "terminals", "references", "intersection", "multiple", "disjoint"}
    lethal |= {"named", "numbered"}
    assert (
        lethal | {"loop", "very nested", "nested text", "groups", "brackets", "remote"} <= refused
    )
    assert outcome({"regex": "still alive"})[0] == "matcher"


NAMES = st.sampled_from("abc")
PATTERNS = st.text("ab.*+?[]()^$\\|{}1,", max_size=8)
BOUNDS = st.integers(-1, 9)
TYPES = ["object", "array", "string", "integer", "number", "boolean", "null", "what"]
VALUES = st.one_of(st.none(), st.integers(), st.text(max_size=5), st.lists(st.booleans()))
LEAVES = [
    st.fixed_dictionaries({"type": st.sampled_from(TYPES)}),
    st.fixed_dictionaries({"const": VALUES}),
    st.fixed_dictionaries({"type": st.just("string"), "pattern": PATTERNS}),
    st.fixed_dictionaries({"minLength": BOUNDS, "maxLength": BOUNDS}),
    st.fixed_dictionaries({"$ref": st.sampled_from(["#", "#/$defs/x", "#/properties/a", "x"])}),
    st.dictionaries(st.sampled_from(["type", "enum", "items", "minimum", "format"]), VALUES),
]


def around(inner):
    """Schemas that hold others."""
    lists, objects = st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=3)
    return st.one_of(
        st.dictionaries(
            st.sampled_from(["anyOf", "allOf", "oneOf"]), lists, min_size=1, max_size=2
        ),
        st.fixed_dictionaries({"properties": objects, "required": st.lists(NAMES)}),
        st.fixed_dictionaries({"type": st.just("array"), "items": inner}),
        st.fixed_dictionaries(
            {"$ref": st.just("#/$defs/x"), "$defs": st.dictionaries(NAMES, inner)}
        ),
        st.fixed_dictionaries({"not": inner}),
    )


SCHEMA = st.recursive(st.one_of(LEAVES), around, max_leaves=8)


@given(st.lists(SCHEMA, min_size=16, max_size=16))
@settings(deadline=None, max_examples=8)
def test_random_schemas_at_concurrency_16(schemas):
    cases = [{"json": schema} for schema in schemas if schema]
    with ThreadPoolExecutor(16) as pool:
        assert all(seconds < 10 for _, seconds in pool.map(outcome, cases))
