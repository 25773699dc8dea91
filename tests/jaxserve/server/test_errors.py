"""What is refused: by which status, in which shape, and with the field's name."""

import json

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.server.state import Limits
from tests.jaxserve.server.fake_llm import FakeLLM
from tests.jaxserve.server.live_server import LiveServer, wait_until

PATHS = [
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/embeddings",
    "/tokenize",
    "/detokenize",
]


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"colour": "red"}, "colour"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 2**40}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 10**9}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
        ({"seed": 2**70}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": [None]}, "stop[0]"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logprobs": 21}, "logprobs"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "x"]}, "prompt"),
        ({"prompt": [[1, 259]]}, "prompt"),
        ({"prompt": [1] * 4096}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_grammar": "nonsense"}, "guided_grammar"),
        ({"guided_json": {"type": "nonsense"}}, "guided_json"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
        ({"prompt": ["x"] * 5, "n": 1000}, "n"),
    ],
)
def test_a_bad_field_is_named(http, asked, param):
    answer = http.post("/v1/completions", json={"prompt": "x"} | asked)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["message"]


def test_a_prompt_too_long_has_openais_code(http):
    error = http.post("/v1/completions", json={"prompt": "x" * 5000}).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "5000" in error["message"] and "4095" in error["message"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": NaN}',
        b"[" * 100_000,
        b'{"prompt": ' * 50_000,
        b'{"messages": [{"role": "user", "content": ' + b"[" * 100_000,
        b'{"tools": ' + b'[{"function": ' * 30_000,
    ],
)
def test_malformed_json_is_400(http, path, body):
    answer = http.post(path, content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(PATHS), st.binary(max_size=64))
def test_any_bytes_are_answered(module_server, path, data):
    with httpx.Client(base_url=module_server.url) as http:
        assert http.post(path, content=data).status_code == 400


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = ["prompt", "messages", "input", "tools", "tool_choice", "stop", "n", "response_format"]
FIELDS += ["logit_bias", "guided_json", "structured_outputs", "stream", "text", "system", "tokens"]


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(PATHS), st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=4))
def test_any_json_is_answered(module_server, path, body):
    with httpx.Client(base_url=module_server.url) as http:
        answer = http.post(path, content=json.dumps(body), timeout=10)
        assert answer.status_code in (200, 400), answer.text


def test_unknown_routes_and_methods(http):
    for answer, status in ((http.get("/v2/models"), 404), (http.get("/v1/completions"), 405)):
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert http.get("/v1/completions").headers["allow"] == "POST"
    assert http.get("/v1/models/other").json()["error"]["code"] == "model_not_found"


def test_names_may_be_aliases():
    names = ["short", "fake/model"]
    with (
        LiveServer(FakeLLM(), served_model_name=names) as live,
        httpx.Client(base_url=live.url) as http,
    ):
        listed = http.get("/v1/models").json()["data"]
        assert [m["id"] for m in listed] == names
        assert http.get("/v1/models/fake/model").json()["id"] == "fake/model"
        for name in names:
            answer = http.post("/v1/completions", json={"prompt": "x", "model": name})
            assert answer.json()["model"] == name


@pytest.fixture(scope="module")
def guarded():
    limits = Limits(max_body_bytes=1000, max_prompt_tokens=10, max_concurrent_requests=2)
    with LiveServer(FakeLLM(), api_key=["secret", "other"], limits=limits) as server:
        yield server


KEY = {"Authorization": "Bearer secret"}


def test_the_key_is_asked_for(guarded):
    with httpx.Client(base_url=guarded.url) as http:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            answer = http.get("/v1/models", headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        for headers in (KEY, {"x-api-key": "other"}):
            assert http.get("/v1/models", headers=headers).status_code == 200
        anthropic = http.post("/v1/messages", json={}).json()
        assert anthropic["error"]["type"] == "authentication_error"
        for path in ("/health", "/version", "/metrics", "/openapi.json"):
            assert http.get(path).status_code == 200


def test_large_bodies_are_turned_away(guarded):
    with httpx.Client(base_url=guarded.url, headers=KEY) as http:
        announced = http.post("/v1/completions", json={"prompt": "x" * 2000})
        chunked = http.post("/v1/completions", content=(b"x" * 100 for _ in range(100)))
        assert announced.status_code == chunked.status_code == 413
        assert chunked.json()["error"]["code"] == "request_too_large"


def test_long_prompts_are_turned_away(guarded):
    with httpx.Client(base_url=guarded.url, headers=KEY) as http:
        assert http.post("/v1/completions", json={"prompt": "x" * 10}).status_code == 200
        answer = http.post("/v1/completions", json={"prompt": "x" * 11})
        assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_too_many_at_once_are_told_to_retry(guarded):
    guarded.llm.delay = 0.005
    body = {"prompt": "x", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with httpx.Client(base_url=guarded.url, headers=KEY) as http:
        with (
            http.stream("POST", "/v1/completions", json=body) as first,
            http.stream("POST", "/v1/completions", json=body) as second,
        ):
            held = [response.iter_lines() for response in (first, second)]
            for lines in held:
                next(lines)
            answer = http.post("/v1/completions", json={"prompt": "x"})
            assert answer.status_code == 429
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["type"] == "rate_limit_error"
            assert http.get("/load").json()["server_load"] == 2
        wait_until(lambda: guarded.state.gate.running == 0)
        guarded.llm.delay = 0.0
        assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 200


def test_a_dead_engine_is_503():
    with LiveServer(FakeLLM()) as live, httpx.Client(base_url=live.url) as http:
        live.llm.shutdown()
        assert http.get("/health").status_code == 503
        assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 503
        assert http.get("/v1/models").status_code == 200
