"""`/v1/chat/completions` through the official client."""

import asyncio
import json

import openai
import pydantic
import pytest

ASK = {"model": "fake/model", "messages": [{"role": "user", "content": "hi"}]}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"$ref": "#/$defs/Days"}},
            "required": ["city"],
            "$defs": {"Days": {"type": "integer"}},
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}


def last_prompt(live):
    return live.llm.submitted[-1][0]


def last_params(live):
    return live.llm.submitted[-1][1]


def test_an_answer(live, client):
    live.llm.script = lambda prompt: "Hello, wörld ☃"
    got = client.chat.completions.create(**ASK)
    choice = got.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", "Hello, wörld ☃")
    assert (choice.finish_reason, choice.message.tool_calls) == ("stop", None)
    assert got.usage.total_tokens == got.usage.prompt_tokens + 17
    assert last_prompt(live).endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_a_stream_adds_up(live, client):
    live.llm.script = lambda prompt: "Hello, wörld ☃"
    text, roles, reasons, usage = "", [], [], None
    options = {"include_usage": True}
    for chunk in client.chat.completions.create(**ASK, stream=True, stream_options=options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            roles.append(choice.delta.role)
            reasons.append(choice.finish_reason)
    assert text == "Hello, wörld ☃"
    assert [r for r in roles if r] == ["assistant"]
    assert [r for r in reasons if r] == ["stop"]
    assert usage.completion_tokens == 17


def test_roles_and_parts_reach_the_template(live, client):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [_past_call('{"city": "Oslo"}')]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    client.chat.completions.create(model="fake/model", messages=messages)
    prompt = last_prompt(live)
    assert "<|im_start|>system\nBe brief.<|im_end|>" in prompt  # this template knows no developer
    assert "<|im_start|>user\na\nb<|im_end|>" in prompt
    assert '"arguments": {"city": "Oslo"}' in prompt
    assert "<|im_start|>tool\nrain<|im_end|>" in prompt


def _past_call(arguments):
    function = {"name": "get_weather", "arguments": arguments}
    return {"id": "call_1", "type": "function", "function": function}


def test_logprobs_have_exact_bytes(live, client):
    live.llm.script = lambda prompt: "é"
    got = client.chat.completions.create(**ASK, logprobs=True, top_logprobs=2)
    rows = got.choices[0].logprobs.content
    assert bytes(b for row in rows for b in row.bytes).decode() == "é"
    assert [row.logprob for row in rows] == [-0.25, -0.25]
    assert [len(row.top_logprobs) for row in rows] == [2, 2]
    assert rows[0].top_logprobs[0].bytes == rows[0].bytes
    streamed = client.chat.completions.create(**ASK, logprobs=True, top_logprobs=2, stream=True)
    chunks = [c.choices[0].logprobs for c in streamed]
    assert [row for found in chunks if found for row in found.content] == rows


def test_continue_final_message(live, client):
    messages = [*ASK["messages"], {"role": "assistant", "content": "Once upon"}]
    client.chat.completions.create(
        model="fake/model", messages=messages, extra_body={"continue_final_message": True}
    )
    assert last_prompt(live).endswith("<|im_start|>assistant\nOnce upon")


def test_template_kwargs_are_honoured_or_refused(live, client):
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    client.chat.completions.create(**ASK, extra_body=off)
    assert last_prompt(live).endswith("<think>\n\n</think>\n\n")
    client.chat.completions.create(**ASK, reasoning_effort="none")
    assert last_prompt(live).endswith("<think>\n\n</think>\n\n")
    for asked in (
        {"extra_body": {"chat_template_kwargs": {"mood": 1}}},
        {"reasoning_effort": "high"},
    ):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**ASK, **asked)


def test_json_schema_by_a_pydantic_model(live, client):
    class Event(pydantic.BaseModel):
        name: str
        day: int

    got = client.chat.completions.parse(**ASK, response_format=Event)
    assert got.choices[0].message.parsed == Event(name="text", day=7)
    assert last_params(live).structured_outputs.json["properties"].keys() == {"name", "day"}


def test_json_object(client):
    got = client.chat.completions.create(**ASK, response_format={"type": "json_object"})
    assert json.loads(got.choices[0].message.content) == {"answer": 42}


def test_tool_choice_none_hides_the_tools(live, client):
    client.chat.completions.create(**ASK, tools=[WEATHER], tool_choice="none")
    assert "get_weather" not in last_prompt(live)


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_tool_is_enforced(live, client, stream):
    named = {"type": "function", "function": {"name": "get_weather"}}
    asked = ASK | {"tools": [WEATHER, TIME], "tool_choice": named}
    calls, reason = _calls(client, asked, stream)
    assert calls == [("get_weather", {"city": "text", "days": 7})]
    assert reason == "tool_calls"
    assert json.loads(last_params(live).structured_outputs.json)["required"] == ["city"]


@pytest.mark.parametrize("stream", [False, True])
def test_required_is_enforced_and_references_still_resolve(live, client, stream):
    asked = ASK | {"tools": [WEATHER, TIME], "tool_choice": "required"}
    calls, reason = _calls(client, asked, stream)
    assert calls == [("get_weather", {"city": "text", "days": 7})]
    assert reason == "tool_calls"
    schema = json.loads(last_params(live).structured_outputs.json)
    days = schema["$defs"]["get_weather"]["properties"]["days"]
    assert days == {"$ref": "#/$defs/get_weather/$defs/Days"}
    assert "maxItems" not in schema


def test_required_without_parallel_calls_allows_one(live, client):
    asked = ASK | {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
    client.chat.completions.create(**asked)
    assert json.loads(last_params(live).structured_outputs.json)["maxItems"] == 1


def _calls(client, asked, stream):
    """Names and arguments of the calls, and the finish reason."""
    if not stream:
        choice = client.chat.completions.create(**asked).choices[0]
        found = [(c.function.name, c.function.arguments) for c in choice.message.tool_calls]
        reason = choice.finish_reason
    else:
        names, arguments, ids, reason = {}, {}, {}, None
        for chunk in client.chat.completions.create(**asked, stream=True):
            reason = chunk.choices[0].finish_reason or reason
            for call in chunk.choices[0].delta.tool_calls or ():
                names.setdefault(call.index, call.function.name)
                ids.setdefault(call.index, call.id)
                arguments[call.index] = arguments.get(call.index, "") + call.function.arguments
        assert all(i.startswith("call_") for i in ids.values())
        found = [(names[i], arguments[i]) for i in sorted(names)]
    return [(name, json.loads(text)) for name, text in found], reason


HERMES = (
    "Let me look.\n"
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
)


@pytest.mark.parametrize("stream", [False, True])
def test_auto_reads_the_models_notation(live, client, stream):
    live.llm.script = lambda prompt: HERMES
    calls, reason = _calls(client, ASK | {"tools": [WEATHER, TIME]}, stream)
    assert calls == [("get_weather", {"city": "Oslo"}), ("get_time", {})]
    assert reason == "tool_calls"
    assert "get_weather" in last_prompt(live)


def test_auto_without_parallel_calls_keeps_the_first(live, client):
    live.llm.script = lambda prompt: HERMES
    asked = ASK | {"tools": [WEATHER, TIME], "parallel_tool_calls": False}
    assert _calls(client, asked, stream=False)[0] == [("get_weather", {"city": "Oslo"})]


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_told_apart(live, client, stream):
    live.llm.script = lambda prompt: "<think>\nhm, well\n</think>\n\nIt rains."
    if stream:
        deltas = [c.choices[0].delta for c in client.chat.completions.create(**ASK, stream=True)]
        reasoning = "".join(getattr(d, "reasoning_content", None) or "" for d in deltas)
        content = "".join(d.content or "" for d in deltas)
    else:
        message = client.chat.completions.create(**ASK).choices[0].message
        reasoning, content = message.reasoning_content, message.content
    assert (reasoning.strip(), content.strip()) == ("hm, well", "It rains.")


def test_strict_tools_constrain_the_calls_but_not_the_text(live, client):
    strict = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
    client.chat.completions.create(**ASK, tools=[strict, TIME])
    grammar = last_params(live).structured_outputs.grammar
    assert "<tool_call>" in grammar and "get_weather" in grammar and "get_time" in grammar


def test_n_choices_stream_apart(client):
    asked = ASK | {"n": 3, "seed": 9}
    whole = [c.message.content for c in client.chat.completions.create(**asked).choices]
    texts = [""] * 3
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == whole
    assert len(set(texts)) == 3


def test_lm_eval_chat_messages_are_understood(http):
    message = {"role": "user", "content": "2+2", "type": "text"}
    body = {
        "messages": [message],
        "model": "fake/model",
        "max_tokens": 4,
        "temperature": 0,
        "stop": ["\n\n"],
        "seed": 1234,
    }
    answer = http.post("/v1/chat/completions", json=body).json()
    assert len(answer["choices"][0]["message"]["content"]) == 4


def test_the_async_client_streams(live):
    async def main():
        async with (
            openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as client,
            client.chat.completions.stream(**ASK) as stream,
        ):
            async for _ in stream:
                pass
            return await stream.get_final_completion()

    final = asyncio.run(main())
    assert len(final.choices[0].message.content) == 24


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
        ),
        ({"tools": [TIME, TIME]}, "tools"),
        ({"tools": [TIME], "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [TIME], "guided_regex": "a"}, "tools"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [_past_call("[1]")]}]},
            "messages[0].tool_calls",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
                ]
            },
            "messages[0].content[0].type",
        ),
        ({"response_format": {"type": "grammar"}}, "response_format.type"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(http, asked, param):
    answer = http.post("/v1/chat/completions", json=ASK | asked)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
