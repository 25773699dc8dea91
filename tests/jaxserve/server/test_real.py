"""The same server before the real engine, on a tiny random model."""

import asyncio
import gc
import json
import random
import resource
import time
from collections import Counter

import httpx
import openai
import pytest

from jaxserve.llm import LLM
from jaxserve.request import SamplingParams
from jaxserve.testing import write_checkpoint
from tests.jaxserve.server.live_server import LiveServer, wait_until

PROMPTS = ["Once", "the quick brown fox", "x" * 50, "2 + 2 ="]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("real") / "tiny", "qwen3")
    llm = LLM(folder, max_model_len=512, progress=False)
    llm.wait_until_warm()
    with LiveServer(llm, served_model_name="tiny") as server:
        yield server


@pytest.fixture
def client(real):
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key="none", max_retries=0) as client:
        yield client
    wait_until(lambda: real.llm.stats().num_running == 0)


def test_what_is_served_is_what_the_engine_writes(real, client):
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=1, prompt_logprobs=1)
    for prompt, output in zip(PROMPTS, real.llm.generate(PROMPTS, params), strict=True):
        got = client.completions.create(
            model="tiny", prompt=prompt, temperature=0, max_tokens=12, logprobs=1, echo=True
        )
        choice, expected = got.choices[0], output.outputs[0]
        assert choice.text == prompt + expected.text
        assert choice.finish_reason == expected.finish_reason
        assert got.usage.completion_tokens == len(expected.token_ids)
        scores = [
            found if found is None else found[token].logprob
            for token, found in zip(
                output.prompt_token_ids + expected.token_ids,
                output.prompt_logprobs + expected.logprobs,
                strict=True,
            )
        ]
        assert choice.logprobs.token_logprobs == pytest.approx(scores, abs=1e-4)


def test_a_stream_is_the_whole_and_seeds_repeat(client):
    asked = {"model": "tiny", "prompt": "Once", "seed": 7, "n": 3, "max_tokens": 20}
    whole = [c.text for c in client.completions.create(**asked).choices]
    texts = [""] * 3
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == whole
    assert len(set(texts)) == 3


def test_schemas_and_tools_are_enforced(client):
    schema = {
        "type": "object",
        "properties": {"size": {"enum": ["s", "m"]}, "ok": {"type": "boolean"}},
        "required": ["size", "ok"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 200}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    got = client.chat.completions.create(**ask, response_format=form)
    assert json.loads(got.choices[0].message.content).keys() == {"size", "ok"}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    named = {"type": "function", "function": {"name": "f"}}
    for choice in ("required", named):
        got = client.chat.completions.create(
            **ask, tools=[tool], tool_choice=choice, parallel_tool_calls=False
        )
        (call,) = got.choices[0].message.tool_calls
        assert call.function.name == "f"
        assert json.loads(call.function.arguments).keys() == {"size", "ok"}


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"prompt": [1, 10**6]}, "prompt"),
        ({"logit_bias": {"1000000": 1}}, "logit_bias"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_grammar": "nonsense"}, "guided_grammar"),
        ({"guided_json": {"type": "nonsense"}}, "guided_json"),
        ({"prompt": "x " * 600}, "prompt"),
        ({"max_tokens": 512}, "max_tokens"),
    ],
)
def test_the_engine_refuses_by_name(real, asked, param):
    answer = httpx.post(f"{real.url}/v1/completions", json={"prompt": "x"} | asked, timeout=30)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_embeddings(real, client):
    got = client.embeddings.create(model="tiny", input=["hi", "ho"], encoding_format="float")
    expected = real.llm.encode(["hi", "ho"])
    for one, other in zip(got.data, expected, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-4)


def test_embeddings_that_nobody_waits_for_free_their_pages(real, monkeypatch):
    engine = real.llm._loop._engine
    step, free = engine.step, engine.stats().num_free_pages
    monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.05), step()))
    body = {"input": [f"{i:03}" * 150 for i in range(200)]}  # several seconds of such steps
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{real.url}/v1/embeddings", json=body, timeout=0.5)
    wait_until(lambda: engine.stats().requests_total.get("abort", 0) > 100, timeout=2)
    wait_until(lambda: not engine.has_work, timeout=2)
    assert engine.stats().num_free_pages == free
    assert real.state.gate.running == 0


def test_hanging_up_frees_the_pages(real, client):
    free = real.llm.stats().num_free_pages
    for _ in range(3):
        stream = client.completions.create(
            model="tiny",
            prompt="x" * 100,
            max_tokens=300,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        stream.close()
    wait_until(lambda: real.llm.stats().num_running == 0)
    wait_until(lambda: real.llm.stats().num_free_pages >= free)


def test_a_hundred_streams_are_each_their_own(real):
    async def one(client, i):
        text = ""
        stream = await client.completions.create(
            model="tiny", prompt=f"{i} is", temperature=0, max_tokens=8, stream=True
        )
        async for chunk in stream:
            text += chunk.choices[0].text
        return text

    async def everybody():
        async with openai.AsyncOpenAI(base_url=f"{real.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(one(client, i) for i in range(100)))

    params = SamplingParams(temperature=0, max_tokens=8)
    alone = real.llm.generate([f"{i} is" for i in range(100)], params)
    assert asyncio.run(everybody()) == [output.outputs[0].text for output in alone]
    assert real.llm.stats().compiles_after_warmup == 0


def random_schema(rng, depth=0):
    """A schema as a fuzzer would write it: often wrong, sometimes hostile."""
    kinds = ["string", "object", "array", "anyOf", "ref", "enum", "pattern", "number", "nonsense"]
    match rng.choice(kinds) if depth < 4 else "string":
        case "object":
            properties = {f"k{i}": random_schema(rng, depth + 1) for i in range(rng.randint(0, 4))}
            required = rng.sample(["k0", "k1", "k9"], rng.randint(0, 3))
            return {"type": "object", "properties": properties, "required": required}
        case "array":
            items = random_schema(rng, depth + 1)
            return {"type": "array", "items": items, "minItems": rng.choice([0, 1, 10**6])}
        case "anyOf":
            schemas = [random_schema(rng, depth + 1) for _ in range(rng.randint(0, 3))]
            return {rng.choice(["anyOf", "oneOf", "allOf", "not"]): schemas}
        case "ref":
            return {"$ref": rng.choice(["#", "#/$defs/none", "http://x/y", "#/properties/k0"])}
        case "enum":
            return {"enum": [None, 1, "a", [1], {"x": 2}][: rng.randint(0, 5)]}
        case "pattern":
            pattern = rng.choice(["(a+)+$", "[", r"\d{1,100000}", "(?=a)b", "^(a|b)*$"])
            return {"type": "string", "pattern": pattern, "minLength": rng.choice([0, 10**6])}
        case kind:
            return {"type": kind}


def test_fuzzed_schemas_leave_the_server_alive(real):
    rng = random.Random(0)
    schemas = [random_schema(rng) for _ in range(150)]

    async def everybody():
        limits = httpx.Limits(max_connections=16)
        async with httpx.AsyncClient(base_url=real.url, timeout=120, limits=limits) as http:
            bodies = [{"prompt": "x", "max_tokens": 20, "guided_json": s} for s in schemas]
            return await asyncio.gather(*(http.post("/v1/completions", json=b) for b in bodies))

    statuses = Counter(answer.status_code for answer in asyncio.run(everybody()))
    assert statuses.keys() == {200, 400}
    assert httpx.get(f"{real.url}/health").status_code == 200
    assert real.llm.stats().num_free_pages == real.llm.stats().num_pages


@pytest.mark.slow
def test_two_thousand_requests_leak_nothing(real):
    async def some(count):
        limits = httpx.Limits(max_connections=32)
        async with httpx.AsyncClient(base_url=real.url, timeout=120, limits=limits) as http:
            bodies = [
                {"prompt": f"{i} is", "max_tokens": 4, "stream": bool(i % 2)} for i in range(count)
            ]
            answers = await asyncio.gather(*(http.post("/v1/completions", json=b) for b in bodies))
            assert {answer.status_code for answer in answers} == {200}

    asyncio.run(some(500))
    gc.collect()
    before = (len(gc.get_objects()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    for _ in range(4):
        asyncio.run(some(500))
    gc.collect()
    stats = real.llm.stats()
    assert stats.num_free_pages == stats.num_pages
    assert (stats.num_running, stats.num_waiting, real.state.gate.running) == (0, 0, 0)
    assert len(gc.get_objects()) < before[0] * 1.05
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before[1] * 1.1
