"""`/v1/responses` through the official client."""

import openai
import pytest
from openai.types.responses import Response

MODEL = "fake/model"
TOOL = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def last_prompt(live):
    return live.llm.submitted[-1][0]


def test_an_answer_is_a_response(live, client):
    live.llm.script = lambda prompt: "Good day."
    got = client.responses.create(
        model=MODEL, input="hi", instructions="Be brief.", metadata={"a": "b"}
    )
    Response.model_validate(got.to_dict())
    assert (got.output_text, got.status, got.metadata) == ("Good day.", "completed", {"a": "b"})
    assert got.usage.output_tokens == 9
    assert got.usage.total_tokens == got.usage.input_tokens + 9
    assert "system\nBe brief." in last_prompt(live)


def test_cut_off_answers_say_so(client):
    got = client.responses.create(model=MODEL, input="hi", max_output_tokens=3)
    assert (got.status, got.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert got.output[0].status == "incomplete"


def test_events_build_the_same_response(live, client):
    live.llm.script = lambda prompt: f"<think>\nhm\n</think>\n\nLooking.\n{CALL}"
    with client.responses.stream(model=MODEL, input="hi", tools=[TOOL]) as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = [e.type for e in events]
    assert [e.sequence_number for e in events if hasattr(e, "sequence_number")] == list(
        range(len(events))
    )
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    assert final.output[0].content[0].text.strip() == "hm"
    assert final.output_text.strip() == "Looking."
    assert final.output[2].name == "get_weather"
    assert final.output[2].arguments.replace(" ", "") == '{"city":"Oslo"}'
    for name in ("reasoning_text", "output_text", "function_call_arguments"):
        assert kinds.count(f"response.{name}.done") == 1
        assert f"response.{name}.delta" in kinds
    assert final.usage.output_tokens_details.reasoning_tokens > 0


def test_finished_items_are_those_of_the_response(live, client):
    live.llm.script = lambda prompt: f"<think>\nhm\n</think>\n\nLooking.\n{CALL}"
    events = list(client.responses.create(model=MODEL, input="hi", tools=[TOOL], stream=True))
    done = [e.item.to_dict() for e in events if e.type == "response.output_item.done"]
    assert [item.to_dict() for item in events[-1].response.output] == done
    added = [e.item.id for e in events if e.type == "response.output_item.added"]
    assert [item["id"] for item in done] == added


def test_the_output_can_be_sent_back(live, client):
    live.llm.script = lambda prompt: f"<think>\nhm\n</think>\n\nLooking.\n{CALL}"
    first = client.responses.create(model=MODEL, input="weather?", tools=[TOOL])
    items = [{"role": "user", "content": "weather?"}, *[i.to_dict() for i in first.output]]
    call_id = first.output[-1].call_id
    items.append({"type": "function_call_output", "call_id": call_id, "output": "rain"})
    client.responses.create(model=MODEL, input=items, tools=[TOOL])
    prompt = last_prompt(live)
    assert "<think>" in prompt and "hm" in prompt
    assert '"name": "get_weather"' in prompt
    assert "<|im_start|>tool\nrain<|im_end|>" in prompt
    assert prompt.count("<|im_start|>assistant") == 2  # one past message, one to write


def test_a_schema_is_enforced(live, client):
    form = {
        "type": "json_schema",
        "name": "n",
        "schema": {"type": "object", "properties": {"day": {"type": "integer"}}},
    }
    got = client.responses.create(model=MODEL, input="hi", text={"format": form})
    assert got.output_text == '{"day": 7}'


def test_a_named_tool_is_enforced(client):
    choice = {"type": "function", "name": "get_weather"}
    got = client.responses.create(model=MODEL, input="hi", tools=[TOOL], tool_choice=choice)
    assert [item.type for item in got.output] == ["function_call"]
    assert got.output[0].arguments == '{"city": "text"}'


def test_logprobs_when_included(live, client):
    live.llm.script = lambda prompt: "ab"
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    got = client.responses.create(model=MODEL, input="hi", **asked)
    rows = got.output[0].content[0].logprobs
    assert [row.token for row in rows] == ["a", "b"]
    assert len(rows[0].top_logprobs) == 2
    streamed = client.responses.create(model=MODEL, input="hi", stream=True, **asked)
    deltas = [e.logprobs for e in streamed if e.type == "response.output_text.delta"]
    assert [row.token for found in deltas for row in found] == ["a", "b"]


def test_an_error_in_mid_stream_is_an_event(live, client):
    live.llm.script = lambda prompt: "good, then FAIL"
    events = list(client.responses.create(model=MODEL, input="hi", stream=True))
    assert events[-1].type == "error"
    assert events[-1].message == "the scripted failure"


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        (
            {"input": [{"type": "function_call_output", "call_id": "c", "output": ""}]},
            "input[0].call_id",
        ),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    ],
)
def test_state_and_services_are_refused_by_name(client, asked, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**{"model": MODEL, "input": "hi"} | asked)
    assert caught.value.param == param


def test_explicit_defaults_ask_for_nothing(client):
    client.responses.create(
        model=MODEL, input="hi", store=False, background=False, truncation="disabled"
    )
