"""`/v1/messages`, in Anthropic's shape."""

import json

import pytest

ASK = {"model": "fake/model", "max_tokens": 400, "messages": [{"role": "user", "content": "hi"}]}
TOOL = {
    "name": "get_weather",
    "description": "Weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def post(http, **asked):
    return http.post("/v1/messages", json=ASK | asked).json()


def events(http, **asked):
    """The stream's events, checked to be named as their data says."""
    answer = http.post("/v1/messages", json=ASK | {"stream": True} | asked)
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in answer.text.strip().split("\n\n"):
        head, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert head == f"event: {found[-1]['type']}"
    return found


def test_an_answer(live, http):
    live.llm.script = lambda prompt: "Good day."
    got = post(http, system="Be brief.")
    assert (got["type"], got["role"], got["model"]) == ("message", "assistant", "fake/model")
    assert got["content"] == [{"type": "text", "text": "Good day."}]
    assert (got["stop_reason"], got["stop_sequence"]) == ("end_turn", None)
    usage = got["usage"]
    assert usage["output_tokens"] == 9
    counted = http.post(
        "/v1/messages/count_tokens",
        json={"messages": ASK["messages"], "system": "Be brief.", "model": "fake/model"},
    ).json()
    assert counted["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert "system\nBe brief." in live.llm.submitted[-1][0]


def test_stop_reasons(live, http):
    live.llm.script = lambda prompt: "one two"
    assert post(http, max_tokens=2)["stop_reason"] == "max_tokens"
    got = post(http, stop_sequences=[" two"])
    assert (got["stop_reason"], got["stop_sequence"]) == ("stop_sequence", " two")


def test_a_stream_builds_the_same_message(live, http):
    live.llm.script = lambda prompt: f"<think>\nhm\n</think>\n\nLooking.\n{CALL}"
    whole = post(http, tools=[TOOL])
    found = events(http, tools=[TOOL])
    assert found[0]["type"] == "message_start"
    assert found[0]["message"]["content"] == []
    blocks = []
    for event in found[1:-2]:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(blocks)
                blocks.append(event["content_block"])
            case "content_block_delta":
                _apply(blocks[event["index"]], event["delta"])
            case "content_block_stop":
                assert event["index"] == len(blocks) - 1
    call = blocks[-1]
    call["input"] = json.loads(call.pop("partial_json"))
    assert [b["type"] for b in blocks] == ["thinking", "text", "tool_use"]
    assert call["input"] == {"city": "Oslo"}
    ids = [whole["content"][-1].pop("id"), call.pop("id")]
    assert all(i.startswith("toolu_") for i in ids)
    assert blocks == whole["content"]
    assert found[-2]["delta"]["stop_reason"] == whole["stop_reason"] == "tool_use"
    assert found[-2]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    assert found[-1] == {"type": "message_stop"}


def _apply(block, delta):
    name = delta.pop("type").removesuffix("_delta")
    key = {"input_json": "partial_json"}.get(name, name)
    block[key] = block.get(key, "") + delta[key]


def test_tool_results_go_back(live, http):
    messages = [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "text", "text": "Looking."},
                {
                    "type": "tool_use",
                    "id": "toolu_1",
                    "name": "get_weather",
                    "input": {"city": "Oslo"},
                },
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_1",
                    "content": [{"type": "text", "text": "rain"}],
                },
                {"type": "text", "text": "So?", "cache_control": {"type": "ephemeral"}},
            ],
        },
    ]
    post(http, messages=messages, tools=[TOOL])
    prompt = live.llm.submitted[-1][0]
    assert "<think>hm</think>Looking." in prompt
    assert '"arguments": {"city": "Oslo"}' in prompt
    assert prompt.index("<|im_start|>tool\nrain") < prompt.index("<|im_start|>user\nSo?")


def test_an_answer_can_be_begun_for_the_model(live, http):
    post(http, messages=[*ASK["messages"], {"role": "assistant", "content": "Once upon"}])
    assert live.llm.submitted[-1][0].endswith("<|im_start|>assistant\nOnce upon")


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_tool_choice_is_enforced(http, choice):
    got = post(http, tools=[TOOL], tool_choice=choice)
    assert [(b["name"], b["input"]) for b in got["content"]] == [("get_weather", {"city": "text"})]
    assert got["stop_reason"] == "tool_use"


def test_thinking_can_be_turned_off(live, http):
    post(http, thinking={"type": "disabled"})
    assert live.llm.submitted[-1][0].endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("asked", "status", "kind"),
    [
        ({"max_tokens": None}, 400, "invalid_request_error"),
        ({"foo": 1}, 400, "invalid_request_error"),
        ({"model": "other"}, 404, "not_found_error"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, 400, "invalid_request_error"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            400,
            "invalid_request_error",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}
                ]
            },
            400,
            "invalid_request_error",
        ),
    ],
)
def test_errors_have_anthropics_shape(http, asked, status, kind):
    answer = http.post("/v1/messages", json=ASK | asked)
    assert answer.status_code == status
    body = answer.json()
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    assert body["error"]["message"]


def test_an_error_in_mid_stream_is_an_event(live, http):
    live.llm.script = lambda prompt: "good, then FAIL"
    last = events(http)[-1]
    assert last["error"] == {"type": "overloaded_error", "message": "the scripted failure"}
