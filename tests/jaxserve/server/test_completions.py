"""`/v1/completions` through the official client, and as lm-eval calls it."""

import asyncio

import openai
import pytest

MODEL = "fake/model"


def test_text_ids_and_lists_of_both(client):
    text = client.completions.create(model=MODEL, prompt="hi", seed=1, max_tokens=8)
    ids = client.completions.create(model=MODEL, prompt=[71, 72], seed=1, max_tokens=8)
    assert text.choices[0].text == ids.choices[0].text
    assert text.usage.prompt_tokens == 2
    assert text.usage.completion_tokens == 8
    assert text.usage.prompt_tokens_details.cached_tokens == 1

    several = client.completions.create(model=MODEL, prompt=["hi", "ho"], seed=1, max_tokens=8)
    assert [c.index for c in several.choices] == [0, 1]
    assert several.choices[0].text == text.choices[0].text
    of_ids = client.completions.create(
        model=MODEL, prompt=[[71, 72], [71, 78]], seed=1, max_tokens=8
    )
    assert [c.text for c in of_ids.choices] == [c.text for c in several.choices]


def test_stream_adds_up_to_the_whole(client):
    asked = {"model": MODEL, "prompt": ["one", "two"], "seed": 3, "n": 2, "logprobs": 2}
    asked["echo"] = True
    whole = client.completions.create(**asked)
    texts, tokens, offsets = [""] * 4, [[] for _ in range(4)], [[] for _ in range(4)]
    reasons, usage = [None] * 4, None
    options = {"include_usage": True}
    for chunk in client.completions.create(**asked, stream=True, stream_options=options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
            offsets[choice.index] += choice.logprobs.text_offset
            reasons[choice.index] = choice.finish_reason
    assert texts == [c.text for c in whole.choices]
    assert texts[0].startswith("one") and texts[3].startswith("two")
    assert tokens == [c.logprobs.tokens for c in whole.choices]
    assert offsets == [c.logprobs.text_offset for c in whole.choices]
    assert reasons == ["length"] * 4
    assert usage == whole.usage


def test_max_tokens_defaults_to_openais_sixteen(client):
    assert client.completions.create(model=MODEL, prompt="x").usage.completion_tokens == 16


def test_the_default_gives_way_to_the_context_and_to_min_tokens(live, client):
    full = [65] * (live.llm.max_model_len - 3)
    got = client.completions.create(model=MODEL, prompt=full)
    assert got.usage.completion_tokens == 3
    client.completions.create(model=MODEL, prompt="x", extra_body={"min_tokens": 20})
    assert live.llm.submitted[-1][1].max_tokens == 20


def test_stop_ends_the_text_and_is_reported(live, client):
    live.llm.script = lambda prompt: "one two three"
    got = client.completions.create(model=MODEL, prompt="x", stop=[" three", " two"]).choices[0]
    assert (got.text, got.finish_reason, got.stop_reason) == ("one", "stop", " two")
    kept = client.completions.create(
        model=MODEL, prompt="x", stop=" two", extra_body={"include_stop_str_in_output": True}
    )
    assert kept.choices[0].text == "one two"


def test_seed_repeats_and_choices_differ(client):
    def ask(seed):
        got = client.completions.create(model=MODEL, prompt="x", seed=seed, n=3)
        return [c.text for c in got.choices]

    assert ask(5) == ask(5) != ask(6)
    assert len(set(ask(5))) == 3


def test_every_sampling_field_reaches_the_engine(live, client):
    extra = {
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "stop_token_ids": [3],
        "min_tokens": 2,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "prompt_logprobs": 1,
    }
    client.completions.create(
        model=MODEL,
        prompt="x",
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.25,
        frequency_penalty=-0.25,
        logit_bias={"65": 2.5},
        logprobs=3,
        best_of=1,
        user="somebody",
        extra_body=extra,
    )
    _, params = live.llm.submitted[0]
    assert {name: getattr(params, name) for name in extra} == extra | {"stop_token_ids": (3,)}
    assert (params.temperature, params.top_p, params.logprobs) == (0.5, 0.9, 3)
    assert (params.presence_penalty, params.frequency_penalty) == (0.25, -0.25)
    assert params.logit_bias == {65: 2.5}


@pytest.mark.parametrize(
    ("extra", "field", "value"),
    [
        ({"guided_json": {"type": "integer"}}, "json", {"type": "integer"}),
        ({"guided_regex": "[0-9]+"}, "regex", "[0-9]+"),
        ({"guided_choice": ["yes", "no"]}, "choice", ["yes", "no"]),
        ({"guided_grammar": "start: /g/"}, "grammar", "start: /g/"),
        ({"structured_outputs": {"json_object": True}}, "json_object", True),
        ({"structured_outputs": {"json": {}}}, "json", "{}"),
    ],
)
def test_constraints_reach_the_engine(live, client, extra, field, value):
    client.completions.create(model=MODEL, prompt="x", extra_body=extra)
    _, params = live.llm.submitted[0]
    assert getattr(params.structured_outputs, field) == value


def test_prompt_logprobs_by_token_id(client):
    got = client.completions.create(model=MODEL, prompt="ab", extra_body={"prompt_logprobs": 2})
    first, second = got.choices[0].prompt_logprobs
    assert first is None
    assert second["65"] == {"logprob": -0.25, "rank": 1, "decoded_token": "b"}
    assert len(second) == 2


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_lm_eval_scores_a_continuation(http, max_tokens):
    """What lm-eval's local-completions sends for a multiple-choice task, and how it reads it."""
    prompts = [[71, 72, 73], [74, 75]]
    answer = http.post(
        "/v1/completions",
        json={
            "model": MODEL,
            "prompt": prompts,
            "temperature": 0,
            "max_tokens": max_tokens,
            "logprobs": 1,
            "seed": 1234,
            "echo": True,
        },
    ).json()
    assert answer["usage"]["completion_tokens"] == 2 * max_tokens
    for choice, ids in zip(answer["choices"], prompts, strict=True):
        scores = choice["logprobs"]["token_logprobs"]
        assert len(scores) == len(ids) + max_tokens
        assert scores[0] is None
        assert scores[1 : len(ids)] == [-0.25] * (len(ids) - 1)
        for score, top in zip(scores[1:], choice["logprobs"]["top_logprobs"][1:], strict=True):
            assert score == max(top.values())


def test_errors_carry_the_field(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="x", suffix="y")
    assert caught.value.param == "suffix"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="x")
    assert missing.value.code == "model_not_found"


def test_an_error_in_mid_stream_is_an_event(live, client):
    live.llm.script = lambda prompt: "good, then FAIL"
    text = ""
    with pytest.raises(openai.APIError, match="scripted failure"):
        for chunk in client.completions.create(model=MODEL, prompt="x", stream=True):
            text += chunk.choices[0].text
    assert text == "good, then FAI"


def test_a_hundred_streams_at_once(live):
    live.llm.delay = 0.001
    before = live.llm.stats().generation_tokens_total

    async def one(client, i):
        text = ""
        stream = await client.completions.create(
            model=MODEL, prompt=f"prompt {i}", seed=i, max_tokens=20, stream=True
        )
        async for chunk in stream:
            text += chunk.choices[0].text
        return text

    async def everybody():
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as client:
            together = await asyncio.gather(*(one(client, i) for i in range(100)))
            return together, await one(client, 42)

    together, alone = asyncio.run(everybody())
    assert all(len(text) == 20 for text in together)
    assert together[42] == alone
    assert live.llm.stats().generation_tokens_total - before == 101 * 20
