"""A model thinks before an answer that is constrained, and the answer still obeys."""

import json
from types import SimpleNamespace

import openai
import pytest
import tokenizers

from jaxserve.llm import LLM
from jaxserve.request import StructuredOutputs
from jaxserve.server.parsing import Notation
from jaxserve.server.tools import ToolUse
from jaxserve.testing import write_checkpoint, write_tokenizer
from jaxserve.text.after_reasoning import MayReason, Reasons
from tests.jaxserve.server.live_server import LiveServer

ASK = {"model": "fake/model", "messages": [{"role": "user", "content": "hi"}]}
THOUGHT = "<think>\nhm, {\n</think>\n\n"
TIME = {"type": "function", "function": {"name": "get_time"}}
NAMED = {"type": "function", "function": {"name": "get_time"}}
CASES = [
    ({"response_format": {"type": "json_object"}}, '{"answer": 42}', []),
    ({"extra_body": {"structured_outputs": {"choice": ["yes"]}}}, "yes", []),
    ({"extra_body": {"guided_regex": "[0-9]"}}, "0", []),
    ({"tools": [TIME], "tool_choice": "required"}, None, [("get_time", "{}")]),
    ({"tools": [TIME], "tool_choice": NAMED}, None, [("get_time", "{}")]),
]


def last_outputs(live):
    return live.llm.submitted[-1][1].structured_outputs


def message(client, asked):
    """Reasoning, content, and calls by name and arguments."""
    m = client.chat.completions.create(**ASK, **asked).choices[0].message
    calls = [(c.function.name, c.function.arguments) for c in m.tool_calls or ()]
    return getattr(m, "reasoning_content", None), m.content, calls


def streamed(client, asked):
    """The same, put together from a stream."""
    reasoning, content, calls = "", "", []
    for chunk in client.chat.completions.create(**ASK, **asked, stream=True):
        delta = chunk.choices[0].delta
        reasoning += getattr(delta, "reasoning_content", None) or ""
        content += delta.content or ""
        for call in delta.tool_calls or ():
            if call.function.name:
                assert reasoning  # no call is announced while the model still thinks
                calls.append((call.function.name, ""))
            calls[-1] = calls[-1][0], calls[-1][1] + (call.function.arguments or "")
    return reasoning or None, content or None, calls


@pytest.mark.parametrize("read", [message, streamed])
@pytest.mark.parametrize(("asked", "content", "calls"), CASES)
def test_a_constraint_concerns_what_follows_the_reasoning(
    live, client, asked, content, calls, read
):
    live.llm.script = lambda prompt: THOUGHT
    assert read(client, asked) == ("hm, {", content, calls)
    assert type(last_outputs(live)) is MayReason


@pytest.mark.parametrize(("asked", "content", "calls"), CASES)
def test_a_model_need_not_think(live, client, asked, content, calls):
    assert message(client, asked) == (None, content, calls)


def test_responses_and_messages_too(live, client, http):
    live.llm.script = lambda prompt: THOUGHT
    form = {"format": {"type": "json_object"}}
    got = client.responses.create(model="fake/model", input="hi", text=form)
    assert [item.type for item in got.output] == ["reasoning", "message"]
    assert got.output_text == '{"answer": 42}'
    tool = {"name": "get_time", "input_schema": {"type": "object"}}
    asked = {"messages": ASK["messages"], "max_tokens": 99, "tools": [tool]}
    forced = http.post("/v1/messages", json=asked | {"tool_choice": {"type": "any"}}).json()
    assert [block["type"] for block in forced["content"]] == ["thinking", "tool_use"]
    assert type(last_outputs(live)) is MayReason


@pytest.mark.parametrize(
    ("prefix", "kind"),
    [("<think>\n", Reasons), ("<think>\n\n</think>\n\n", StructuredOutputs), ("", MayReason)],
)
def test_the_prompt_says_what_there_is_to_wait_for(live, client, monkeypatch, prefix, kind):
    templates = live.llm.tokenizer.chat_templates
    tail = "{% endif -%}"
    template = templates["default"].removesuffix(tail) + f"{{{{ {prefix!r} }}}}" + tail
    monkeypatch.setitem(templates, "default", template)
    client.chat.completions.create(**ASK, response_format={"type": "json_object"})
    assert live.llm.submitted[-1][0].endswith("assistant\n" + prefix)
    assert type(last_outputs(live)) is kind


def test_thinking_that_is_switched_off_leaves_nothing_to_wait_for(live, client):
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    client.chat.completions.create(**ASK, response_format={"type": "json_object"}, extra_body=off)
    assert type(last_outputs(live)) is StructuredOutputs


def test_a_completion_is_constrained_from_its_first_token(live, http):
    http.post("/v1/completions", json={"prompt": "<think>\n", "guided_regex": "[0-9]"})
    assert type(last_outputs(live)) is StructuredOutputs


@pytest.mark.parametrize("reasoning", [None, "openai_gptoss"])
def test_without_tags_nothing_is_waited_for(reasoning):
    forced = ToolUse.of([SimpleNamespace(name="f", parameters=None)], "required")
    notation = Notation("hermes", reasoning)
    assert not forced.reader(notation, constrained=False).reasons
    assert not ToolUse().reader(notation, constrained=True).reasons


# ---- the real engine -------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"size": {"enum": ["s", "m"]}, "ok": {"type": "boolean"}},
    "required": ["size", "ok"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    """A tiny random model whose tokenizer has the tags, and whose template ends as it is told."""
    folder = write_checkpoint(tmp_path_factory.mktemp("real") / "tiny", "qwen3")
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    write_tokenizer(folder, vocab - 2, adds_bos=False)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens(["<think>", "</think>"])
    backend.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] += "{{ prefix }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    llm = LLM(folder, max_model_len=512, progress=False)
    with LiveServer(llm, served_model_name="fake/model") as server:
        yield server


@pytest.mark.parametrize(
    ("prefix", "thinks"), [("<think>\n", True), ("", True), ("<think>\n\n</think>\n\n", False)]
)
@pytest.mark.parametrize("forced", [False, True])
def test_the_engine_constrains_the_answer_alone(thinking, prefix, thinks, forced):
    tokenizer = thinking.llm.tokenizer
    tags = [tokenizer.backend.token_to_id(tag) for tag in ("<think>", "</think>")]
    extra = {"chat_template_kwargs": {"prefix": prefix}}
    asked = ASK | {"n": 8, "seed": 1, "max_tokens": 200, "extra_body": extra}
    # A random model seldom closes a tag, and may end within the reasoning.
    bias = dict.fromkeys(tags, 4.0) | dict.fromkeys(tokenizer.eos_token_ids, -100.0)
    asked["logit_bias"] = {str(token): value for token, value in bias.items()}
    if forced:
        asked["tools"] = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
        asked["tool_choice"] = {"type": "function", "function": {"name": "f"}}
    else:
        form = {"name": "n", "schema": SCHEMA}
        asked["response_format"] = {"type": "json_schema", "json_schema": form}
    with openai.OpenAI(base_url=f"{thinking.url}/v1", api_key="none", max_retries=0) as client:
        messages = [c.message for c in client.chat.completions.create(**asked).choices]
    texts = [m.tool_calls[0].function.arguments if forced else m.content for m in messages]
    assert all(json.loads(text).keys() == {"size", "ok"} for text in texts)
    assert any(getattr(m, "reasoning_content", None) for m in messages) == thinks
