"""Events depend on the text, never on how it was cut; what is no call stays content."""

# ruff: noqa: RUF001 - DeepSeek's tokens are spelled with fullwidth bars

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.errors import ConfigError
from jaxserve.text.parsers import (
    REASONING_PARSERS,
    TOOL_CALL_PARSERS,
    Content,
    Event,
    OutputParser,
    Reasoning,
    ToolCall,
    make_parser,
    parsers_of,
)

CALL = '{"name": "f", "arguments": {"city": "Zürich", "n": [1, {"a": "}"}]}}'
ARGUMENTS = {"city": "Zürich", "n": [1, {"a": "}"}]}
PARAMETERS = CALL.replace("arguments", "parameters")
TEXT = json.dumps(ARGUMENTS, ensure_ascii=False)
F = ("f", ARGUMENTS)
G = ("g", {})


def joined(events: list[Event]) -> list[tuple]:
    """Neighbouring texts in one, calls by name and arguments; indexes must count up."""
    found: list[tuple] = []
    calls = 0
    for event in events:
        match event:
            case ToolCall(index, _, name, arguments):
                assert index == calls
                calls += 1
                found.append((name, json.loads(arguments)))
            case Content(text) | Reasoning(text):
                assert text
                if found and found[-1][0] is type(event):
                    text = found.pop()[1] + text
                found.append((type(event), text))
    return found


def parse(parser: OutputParser, pieces: list[str]) -> list[tuple]:
    return joined([e for piece in pieces for e in parser.push(piece)] + parser.finish())


def content(text: str) -> tuple:
    return (Content, text)


def reasoning(text: str) -> tuple:
    return (Reasoning, text)


def deepseek(*calls: str) -> str:
    inner = "\n".join(f"<｜tool▁call▁begin｜>{call}<｜tool▁call▁end｜>" for call in calls)
    return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"


SEP = "<｜tool▁sep｜>"
DEEP = "<tool_call>" + "[" * 99999 + "</tool_call>"
V3 = f"function{SEP}f\n```json\n{TEXT}\n```"
HM = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"
TO_F = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>"

# (tool-call parser, reasoning parser, text, events)
CASES = [
    (None, None, "plain <think> text", [content("plain <think> text")]),
    (
        None,
        "qwen3",
        "<think>\nhm\n\nso\n</think>\n\nYes. ",
        [reasoning("hm\n\nso"), content("Yes. ")],
    ),
    (None, "qwen3", "<think>\n\n</think>\n\nYes", [content("Yes")]),
    (None, "qwen3", "Yes <think> no", [content("Yes <think> no")]),
    (None, "qwen3", "<think>cut sho", [reasoning("cut sho")]),
    (None, "qwen3", "<think>a </thin", [reasoning("a </thin")]),
    (None, "qwen3", "\n<thin", [content("\n<thin")]),
    (None, "deepseek_r1", "hm</think>Yes", [reasoning("hm"), content("Yes")]),
    (
        None,
        "deepseek_r1",
        "<think>hm</think>Yes</think>",
        [reasoning("hm"), content("Yes</think>")],
    ),
    (None, "deepseek_r1", "<th", [reasoning("<th")]),
    ("hermes", None, "no call\n", [content("no call\n")]),
    ("hermes", None, f"I look.\n<tool_call>\n{CALL}\n</tool_call>", [content("I look."), F]),
    (
        "hermes",
        "qwen3",
        f"<think>a <tool_call> b</think>\n\n<tool_call>{CALL}</tool_call>\n"
        '<tool_call>\n{"name": "g"}\n</tool_call>\n',
        [reasoning("a <tool_call> b"), F, G],
    ),
    ("hermes", None, f"<tool_call>{CALL}</tool_call>\n done ", [F, content("done ")]),
    ("hermes", None, f"<tool_call>{CALL}", [F]),
    (
        "hermes",
        None,
        "a <tool_call>{bad}</tool_call> b",
        [content("a <tool_call>{bad}</tool_call> b")],
    ),
    (
        "hermes",
        None,
        '<tool_call>{"name": 3}</tool_call>',
        [content('<tool_call>{"name": 3}</tool_call>')],
    ),
    ("hermes", None, '<tool_call>{"name": "f", "argu', [content('<tool_call>{"name": "f", "argu')]),
    ("hermes", None, "a < b <tool", [content("a < b <tool")]),
    ("hermes", None, '<tool_call>{"name": "g", "arguments": "{}"}</tool_call>', [G]),
    ("hermes", None, DEEP, [content(DEEP)]),
    ("llama3_json", None, PARAMETERS, [F]),
    ("llama3_json", None, f" {PARAMETERS}; {PARAMETERS}\n", [F, F]),
    ("llama3_json", None, f"<|python_tag|>{PARAMETERS}<|eom_id|>", [F]),
    ("llama3_json", None, f"See: <|python_tag|>{CALL}", [content("See:"), F]),
    ("llama3_json", None, '{"answer": 4}', [content('{"answer": 4}')]),
    (
        "llama3_json",
        None,
        '{"name": "Ada", "age": 36, }',
        [content('{"name": "Ada", "age": 36, }')],
    ),
    ("llama3_json", None, "Hello {", [content("Hello {")]),
    ("llama3_json", None, "{", [content("{")]),
    ("llama3_json", None, "<|python_tag|>print(1)", [content("<|python_tag|>print(1)")]),
    ("mistral", None, f"[TOOL_CALLS][{CALL}, {CALL}]</s>", [F, F]),
    (
        "mistral",
        None,
        f"[TOOL_CALLS]f[ARGS]{TEXT}[TOOL_CALLS]g[CALL_ID]123456789[ARGS]{{}}",
        [F, G],
    ),
    ("mistral", None, "Sure [TOOL_CALLS]", [content("Sure [TOOL_CALLS]")]),
    ("mistral", None, "[TOOL_CALLS][{]", [content("[TOOL_CALLS][{]")]),
    ("mistral", None, "[TOOL", [content("[TOOL")]),
    (
        "deepseek_v3",
        None,
        "Hi\n" + deepseek(V3, V3) + "<｜end▁of▁sentence｜>",
        [content("Hi"), F, F],
    ),
    (
        "deepseek_v3",
        "deepseek_r1",
        "hm</think>\n" + deepseek(f"f{SEP}{TEXT}"),
        [reasoning("hm"), F],
    ),
    (
        "deepseek_v3",
        None,
        deepseek(f"f{SEP}{{"),
        [content(f"<｜tool▁call▁begin｜>f{SEP}{{<｜tool▁call▁end｜>")],
    ),
    ("openai", None, f"{HM}{FINAL}Yes<|return|>", [reasoning("hm"), content("Yes")]),
    ("openai", "openai_gptoss", f"{HM}{TO_F}{TEXT}<|call|>", [reasoning("hm"), F]),
    ("openai", None, f" to=functions.f<|channel|>commentary json<|message|>{TEXT}", [F]),
    (
        "openai",
        None,
        f"<|channel|>commentary<|message|>Plan:<|end|>{TO_F}{TEXT}<|call|>",
        [content("Plan:"), F],
    ),
    ("openai", None, f"{TO_F}{{bad<|call|>", [content(f"{TO_F}{{bad")]),
    ("openai", None, "<|channel|>analysis to=python<|message|>1+1<|call|>", [reasoning("1+1")]),
    ("openai", None, f"{FINAL}a < b <|", [content("a < b <|")]),
    (None, "openai_gptoss", "no header <|return|>", [content("no header ")]),
    (None, "openai_gptoss", "<|chan", [content("<|chan")]),
]


@pytest.mark.parametrize(("tools", "thinking", "text", "expected"), CASES)
def test_the_whole_text(tools, thinking, text, expected):
    assert parse(make_parser(tools, thinking), [text]) == expected


@pytest.mark.parametrize(("tools", "thinking", "text", "expected"), CASES)
def test_character_by_character(tools, thinking, text, expected):
    if len(text) > 5000:
        text = [text[i : i + 5000] for i in range(0, len(text), 5000)]
    assert parse(make_parser(tools, thinking), list(text)) == expected


PAIRS = [*itertools.product([None, *TOOL_CALL_PARSERS], [None, *REASONING_PARSERS])]
FRAGMENTS = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]",
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", SEP, "<|start|>",
    "<|end|>", "<|channel|>", "<|message|>", "<|call|>", "analysis", "final", "to=functions.f", "f",
    "<function=f>", "<parameter=a>", "</parameter>", "</function>",
    "[ARGS]", CALL, PARAMETERS, TEXT, "{", "}", " ", "\n", "word", "<", "|", '"', ";",
]  # fmt: skip


@given(st.sampled_from(PAIRS), st.lists(st.sampled_from(FRAGMENTS), max_size=10), st.data())
@settings(deadline=None, max_examples=400)
def test_any_chunking_gives_the_same_events(names, fragments, data):
    text = "".join(fragments)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    assert parse(make_parser(*names), pieces) == parse(make_parser(*names), [text])


@given(st.sampled_from(PAIRS), st.text(st.characters(exclude_characters="<{[｜"), max_size=40))
def test_text_without_marks_is_content_to_the_letter(names, text):
    tools, thinking = names
    if thinking == "deepseek_r1" or text.startswith(" to="):
        return
    assert parse(make_parser(tools, thinking), [text]) == ([content(text)] if text else [])


def test_content_is_not_held_back_longer_than_a_mark_may_need():
    parser = make_parser("hermes", "qwen3")
    assert parser.push("Hello") == [Content("Hello")]
    assert parser.push(" <tool") == []
    assert parser.push("box>") == [Content(" <toolbox>")]
    parser = make_parser(None, "deepseek_r1")
    assert parser.push("I think") == [Reasoning("I think")]
    parser = make_parser("llama3_json")
    assert parser.push('{"city": ') == [Content('{"city":')]


@pytest.mark.parametrize(
    ("prompt", "inside"),
    [("user: hi\n<think>\n", True), ("<think>\n\n</think>\n\n", False), ("user: hi", False)],
)
@pytest.mark.parametrize("name", ["qwen3", "deepseek_r1"])
def test_the_prompt_tells_where_reasoning_begins(name, prompt, inside):
    expected = [reasoning("a")] if inside else [content("a")]
    assert parse(make_parser(None, name, prompt), ["a"]) == expected


def test_a_great_many_marks_at_once():
    assert parse(make_parser("deepseek_v3"), ["<｜tool▁calls▁begin｜>" * 1000 + "x"]) == [
        content("x")
    ]
    assert len(make_parser("hermes").push(f"<tool_call>{CALL}</tool_call>" * 1000)) == 1000
    assert parse(make_parser("openai"), ["<|end|>" * 1000]) == []


def test_calls_have_ids_of_their_own():
    text = f"<tool_call>{CALL}</tool_call>" * 2
    first, second = make_parser("hermes").push(text)
    assert first.id.startswith("call_")
    assert first.id != second.id


def test_which_families_need_special_tokens():
    need = {name for name in TOOL_CALL_PARSERS if make_parser(name).needs_special_tokens}
    assert need == {"llama3_json", "mistral", "deepseek_v3", "openai"}
    assert not make_parser(None, "deepseek_r1").needs_special_tokens
    assert make_parser("mistral", "deepseek_r1").needs_special_tokens
    assert make_parser(None, "openai_gptoss").needs_special_tokens


def test_parsers_are_known_by_model_type():
    assert parsers_of("qwen3") == ("hermes", "qwen3")
    assert parsers_of("gpt_oss") == ("openai", "openai_gptoss")
    assert parsers_of("gemma3") == (None, None)
    for model_type in ("llama", "mistral", "deepseek_v3", "qwen2", "qwen3_moe"):
        make_parser(*parsers_of(model_type))


@pytest.mark.parametrize("names", [("nope", None), (None, "nope")])
def test_an_unknown_name_lists_the_known_ones(names):
    with pytest.raises(ConfigError, match=r"'nope' is not known; choose from .*(hermes|qwen3)"):
        make_parser(*names)
