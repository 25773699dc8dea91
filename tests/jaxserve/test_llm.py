"""The Python API: every parameter is honoured, results are as vLLM's, and `LLM` lets go."""

from __future__ import annotations

import asyncio
import gc
import itertools
import re
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxserve import LLM, SamplingParams
from jaxserve.errors import EngineError, RequestError
from jaxserve.request import CompletionOutput, RequestOutput, StructuredOutputs
from tests.interrupting import interrupted
from tests.jaxserve.engine.engines import checkpoint, dawdle, serve

PROMPT = "The quick brown fox"
IM_START = 3  # a special token that ends nothing


@pytest.fixture(scope="module")
def served() -> Iterator[LLM]:
    with serve() as llm:
        yield llm


@pytest.fixture
def llm(served: LLM) -> Iterator[LLM]:
    """The same model for every test, which must leave nothing running."""
    yield served
    assert served.drain(10)
    stats = served.stats()
    assert stats.num_free_pages == stats.num_pages


@pytest.fixture
def slow(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> LLM:
    """The model at 20 ms a step, so that there is time to interfere."""
    return dawdle(llm, monkeypatch)


def ask(llm: LLM, prompt: Any = PROMPT, **params: Any) -> RequestOutput:
    (out,) = llm.generate(prompt, SamplingParams(**params))
    return out


def one(llm: LLM, prompt: Any = PROMPT, **params: Any) -> CompletionOutput:
    (output,) = ask(llm, prompt, **params).outputs
    return output


# ---- honour it or refuse it: refusals are in test_request.py -------------------------------------

SEEDED = {"seed": 1, "max_tokens": 12, "ignore_eos": True}
GREEDY = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True}
HONOURED: dict[str, tuple[dict[str, Any], Any]] = {
    "n": (SEEDED, 2),
    "temperature": (SEEDED, 0.0),
    "top_p": (SEEDED, 0.1),
    "top_k": (SEEDED, 1),
    "min_p": (SEEDED, 1.0),
    "seed": (SEEDED, 2),
    "stop": (SEEDED, lambda said: said.text[4]),
    "stop_token_ids": (SEEDED, lambda said: [said.token_ids[5]]),
    "include_stop_str_in_output": ({**SEEDED, "stop": ["e", "t", "a", " "]}, True),
    "max_tokens": (SEEDED, 5),
    "min_tokens": ({**SEEDED, "stop_token_ids": tuple(range(5, 320))}, 4),
    "logprobs": (SEEDED, 2),
    "prompt_logprobs": (SEEDED, 2),
    "logit_bias": (SEEDED, {7: 100.0}),
    "presence_penalty": (GREEDY, 2.0),
    "frequency_penalty": (GREEDY, 2.0),
    "repetition_penalty": (GREEDY, 5.0),
    "ignore_eos": ({**SEEDED, "ignore_eos": False, "logit_bias": {1: 100.0}}, True),
    "skip_special_tokens": ({**SEEDED, "logit_bias": {IM_START: 100.0}}, False),
    "structured_outputs": (SEEDED, StructuredOutputs(regex="[0-9]{4}")),
}


def essence(out: RequestOutput) -> Any:
    return out.outputs, out.prompt_logprobs


@pytest.mark.parametrize("name", HONOURED)
def test_a_parameter_changes_the_result(llm: LLM, name: str):
    base, value = HONOURED[name]
    before = ask(llm, **base)
    assert essence(before) == essence(ask(llm, **base)), "the same request says the same"
    value = value(before.outputs[0]) if callable(value) else value
    assert essence(before) != essence(ask(llm, **{**base, name: value}))


def test_no_parameter_was_forgotten():
    assert HONOURED.keys() == SamplingParams.__dataclass_fields__.keys()


# ---- ends ------------------------------------------------------------------------------------


def test_max_tokens_ends_with_length(llm: LLM):
    out = one(llm, **SEEDED)
    assert (len(out.token_ids), out.finish_reason, out.stop_reason) == (12, "length", None)
    assert out.finished
    assert llm.tokenizer is not None
    assert out.text == llm.tokenizer.decode(out.token_ids)


def test_without_max_tokens_the_context_is_the_end(llm: LLM):
    out = ask(llm, ignore_eos=True, seed=0)
    assert len(out.prompt_token_ids) + len(out.outputs[0].token_ids) == llm.max_model_len
    assert out.outputs[0].finish_reason == "length"


def test_eos_ends_and_is_no_text(llm: LLM):
    out = one(llm, seed=1, max_tokens=12, logit_bias={1: 100.0})
    assert (out.token_ids, out.text) == ([1], "")
    assert (out.finish_reason, out.stop_reason) == ("stop", None)


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token_is_named_and_left_out_of_the_text(llm: LLM, include: bool):
    said = one(llm, **SEEDED)
    at = next(i for i, t in enumerate(said.token_ids) if i > 3 and t not in said.token_ids[:i])
    token = said.token_ids[at]
    out = one(llm, **SEEDED, stop_token_ids=[token], include_stop_str_in_output=include)
    assert out.token_ids == said.token_ids[: at + 1]
    assert (out.finish_reason, out.stop_reason) == ("stop", token)
    assert llm.tokenizer is not None
    assert out.text == llm.tokenizer.decode(out.token_ids if include else out.token_ids[:-1])


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_cuts_the_text(llm: LLM, include: bool):
    for seed in range(12):
        asked = {**SEEDED, "seed": seed, "max_tokens": 30}
        text = one(llm, **asked).text
        for stop in (text[5], text[3:6], text[-8:-5]):
            out = one(llm, **asked, stop=["never said", stop], include_stop_str_in_output=include)
            assert (out.finish_reason, out.stop_reason) == ("stop", stop)
            assert out.text == text[: text.find(stop) + (len(stop) if include else 0)]


def test_a_stop_string_may_come_with_the_last_token(llm: LLM):
    said = one(llm, **SEEDED)
    last = one(llm, **{**SEEDED, "max_tokens": 11}).text
    tail = said.text[len(last) :]
    if tail and tail not in last:
        out = one(llm, **SEEDED, stop=tail)
        assert (out.finish_reason, out.stop_reason, out.text) == ("stop", tail, last)


@pytest.mark.parametrize("minimum", [1, 5, 12])
def test_min_tokens_hold_every_end_back(llm: LLM, minimum: int):
    """Neither eos, nor a stop token, nor a stop string ends a text before that."""
    bias = {1: 8.0, 4: 8.0}
    out = one(llm, seed=0, max_tokens=12, min_tokens=minimum, logit_bias={1: 100.0})
    assert len(out.token_ids) == min(minimum + 1, 12)
    assert 1 not in out.token_ids[:minimum]
    for seed in range(5):
        stops = {"stop_token_ids": [20, 30], "stop": ["e", "t", "o", " "], "logit_bias": bias}
        out = one(llm, seed=seed, max_tokens=12, min_tokens=minimum, **stops)
        assert len(out.token_ids) >= minimum
        assert not {1, 4, 20, 30} & set(out.token_ids[:minimum])


# ---- scores ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 5, 20])
def test_logprobs_hold_the_token_and_the_likeliest(llm: LLM, n: int):
    out = one(llm, **SEEDED, temperature=1.5, logprobs=n)
    assert out.logprobs is not None
    assert len(out.logprobs) == len(out.token_ids)
    for token, entry in zip(out.token_ids, out.logprobs, strict=True):
        assert next(iter(entry)) == token
        assert len(entry) in (n, n + 1)
        ranks = [logprob.rank for logprob in entry.values()]
        assert sorted(ranks)[:n] == list(range(1, n + 1))
        ordered = sorted(entry.values(), key=lambda logprob: logprob.rank or 0)
        assert all(a.logprob >= b.logprob for a, b in itertools.pairwise(ordered))
        assert llm.tokenizer is not None
        assert entry[token].decoded_token == llm.tokenizer.token_text(token)
    total = sum(entry[t].logprob for t, entry in zip(out.token_ids, out.logprobs, strict=True))
    assert out.cumulative_logprob == pytest.approx(total, abs=1e-5)


def test_prompt_logprobs_score_all_but_the_first(llm: LLM):
    ids = list(range(5, 45))
    out = ask(llm, ids, max_tokens=1, prompt_logprobs=2)
    assert out.prompt_logprobs is not None
    first, *rest = out.prompt_logprobs
    assert first is None
    assert [next(iter(entry)) for entry in rest if entry] == ids[1:]
    assert ask(llm, ids, max_tokens=1).prompt_logprobs is None
    assert ask(llm, [7], max_tokens=1, prompt_logprobs=0).prompt_logprobs == [None]


def test_prompt_and_output_are_scored_alike(llm: LLM):
    """What a text scored while it was said, it scores as a prompt."""
    prompt = [9, 8, 7]
    said = one(llm, prompt, **SEEDED, logprobs=0)
    out = ask(llm, prompt + said.token_ids, max_tokens=1, prompt_logprobs=0)
    assert said.logprobs is not None
    assert out.prompt_logprobs is not None
    for a, b in zip(said.logprobs, out.prompt_logprobs[3:], strict=True):
        assert b is not None
        (token, x), (other, y) = next(iter(a.items())), next(iter(b.items()))
        assert token == other
        assert x.logprob == pytest.approx(y.logprob, abs=1e-4)
        assert x.rank == y.rank


# ---- structured outputs --------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["n"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        (StructuredOutputs(regex="(ab|cd){2,3}[0-9]"), "(ab|cd){2,3}[0-9]"),
        (StructuredOutputs(choice=["yes", "no", "maybe so"]), "yes|no|maybe so"),
        (StructuredOutputs(json=SCHEMA), r'\{\s*"n"\s*:\s*[0-9]{1,2}\s*\}'),
        (StructuredOutputs(grammar='start: "<" /[a-c]{3}/ ">"'), "<[a-c]{3}>"),
    ],
    ids=["regex", "choice", "json", "grammar"],
)
def test_a_grammar_is_obeyed(llm: LLM, constraint: StructuredOutputs, pattern: str):
    params = SamplingParams(structured_outputs=constraint, max_tokens=60, n=3, seed=3)
    requests = llm.generate([PROMPT, "Once"], params)
    free = one(llm, **SEEDED)
    for output in (o for r in requests for o in r.outputs):
        assert re.fullmatch(pattern, output.text), output.text
        assert output.finish_reason == "stop"
    assert free == one(llm, **SEEDED)


def test_a_grammar_that_is_cut_off_says_length(llm: LLM):
    out = one(llm, structured_outputs=StructuredOutputs(regex="a{50}"), max_tokens=3)
    assert (out.finish_reason, set(out.text)) == ("length", {"a"})


def test_a_grammar_ends_whatever_the_minimum(llm: LLM):
    """It permits nothing but the end, so that is what comes."""
    regex = StructuredOutputs(regex="ab")
    out = one(llm, structured_outputs=regex, min_tokens=9, max_tokens=20)
    assert (out.text, out.finish_reason) == ("ab", "stop")


@pytest.mark.parametrize(
    "constraint",
    [
        StructuredOutputs(regex="(unclosed"),
        StructuredOutputs(json="{not json"),
        StructuredOutputs(json={"type": "no such type"}),
        StructuredOutputs(grammar="start: missing_rule"),
    ],
    ids=["regex", "text", "schema", "grammar"],
)
def test_a_wrong_grammar_is_refused(llm: LLM, constraint: StructuredOutputs):
    with pytest.raises(RequestError, match="structured_outputs") as raised:
        one(llm, structured_outputs=constraint)
    assert raised.value.param == "structured_outputs"


# ---- the same in other ways ------------------------------------------------------------------


def joined(deltas: list[CompletionOutput], n: int = 1) -> list[tuple[str, list[int], Any]]:
    out: list[tuple[str, list[int], Any]] = [("", [], None)] * n
    for d in deltas:
        text, ids, _ = out[d.index]
        out[d.index] = (text + d.text, ids + d.token_ids, d.finish_reason)
    return out


def test_a_stream_adds_up_to_the_whole(llm: LLM):
    params = SamplingParams(**SEEDED, n=3, stop=["zz"], logprobs=1)
    whole = llm.generate(PROMPT, params)[0].outputs
    deltas = list(llm.stream(PROMPT, params))
    assert joined(deltas, 3) == [(o.text, o.token_ids, o.finish_reason) for o in whole]
    assert all(len(d.token_ids) == 1 for d in deltas)
    assert sum(d.finished for d in deltas) == 3


def test_leaving_a_stream_aborts_it(slow: LLM):
    for delta in slow.stream(PROMPT, SamplingParams(ignore_eos=True)):
        assert not delta.finished
        break
    assert slow.drain(1), "100 tokens would take two seconds"
    assert slow.stats().requests_total["abort"] >= 1


def test_async_variants_say_the_same(llm: LLM):
    params = SamplingParams(**SEEDED)

    async def both() -> tuple[RequestOutput, list[CompletionOutput]]:
        whole, deltas = await asyncio.gather(llm.generate_async(PROMPT, params), stream())
        return whole, deltas

    async def stream() -> list[CompletionOutput]:
        return [delta async for delta in llm.stream_async(PROMPT, params)]

    whole, deltas = asyncio.run(both())
    assert essence(whole) == essence(ask(llm, **SEEDED))
    assert joined(deltas) == [(o.text, o.token_ids, o.finish_reason) for o in whole.outputs]


def test_cancelling_a_task_aborts_its_request(slow: LLM):
    async def give_up() -> None:
        task = slow.generate_async(PROMPT, SamplingParams(ignore_eos=True))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(task, 0.2)

    asyncio.run(give_up())
    assert slow.drain(1)


def test_prompts_come_in_four_forms(llm: LLM):
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode(PROMPT)
    forms = [PROMPT, ids, {"prompt": PROMPT}, {"prompt_token_ids": ids}]
    outs = llm.generate(forms, SamplingParams(**SEEDED))
    assert all(out.outputs == outs[0].outputs for out in outs)
    assert [out.prompt for out in outs] == [PROMPT, None, PROMPT, None]
    assert llm.generate([], SamplingParams()) == []


def test_each_prompt_may_have_parameters_of_its_own(llm: LLM):
    params = [SamplingParams(**SEEDED), SamplingParams(**{**SEEDED, "max_tokens": 3})]
    long, short = llm.generate([PROMPT, PROMPT], params)
    assert short.outputs[0].token_ids == long.outputs[0].token_ids[:3]
    with pytest.raises(RequestError, match="2 sampling_params for 3 prompts"):
        llm.generate([PROMPT] * 3, params)


def test_chat_is_the_template_and_then_generation(llm: LLM):
    messages = [{"role": "user", "content": "Where does the time go?"}]
    (out,) = llm.chat(messages, SamplingParams(**SEEDED))
    assert out.prompt_token_ids == llm.encode_chat(messages)
    assert out.outputs == llm.generate([out.prompt_token_ids], SamplingParams(**SEEDED))[0].outputs
    both = llm.chat([messages, [{"role": "user", "content": "Hi"}]], SamplingParams(**SEEDED))
    assert len(both) == 2
    assert both[0].outputs == out.outputs


def test_the_last_hidden_state_is_what_the_head_reads(llm: LLM):
    head = load_file(checkpoint() / "model.safetensors")["lm_head.weight"]
    (embedding,) = llm.encode(PROMPT)
    greedy = one(llm, temperature=0.0, max_tokens=1)
    assert int((head @ np.array(embedding.embedding)).argmax()) == greedy.token_ids[0]
    assert embedding.prompt_token_ids == ask(llm, max_tokens=1).prompt_token_ids


def test_embeddings_pool_and_score(llm: LLM):
    texts = [PROMPT, "a quite different text", PROMPT]
    last, mean = llm.encode(texts), llm.encode(texts, pooling="mean")
    assert last[0].embedding == pytest.approx(last[2].embedding, abs=1e-5)
    assert last[0].embedding != pytest.approx(mean[0].embedding, abs=1e-2)
    other, same = llm.score(PROMPT, texts[1:])
    assert same == pytest.approx(1, abs=1e-5)
    assert -1 <= other < 0.999
    (one_token,) = llm.embed([[7]], "last")
    assert one_token.embedding == pytest.approx(llm.embed([[7]], "mean")[0].embedding)
    assert llm.embed(PROMPT)[0].embedding == pytest.approx(last[0].embedding, abs=1e-5)
    assert len(llm.embed([PROMPT, {"prompt_token_ids": [7]}])) == 2
    with pytest.raises(RequestError, match="pooling='max'"):
        llm.encode(PROMPT, pooling="max")


# ---- letting go --------------------------------------------------------------------------------


def test_an_interrupt_aborts_and_the_engine_goes_on(slow: LLM):
    with interrupted(lambda: slow.stats().num_running):
        slow.generate([PROMPT] * 12, SamplingParams(ignore_eos=True))
    assert slow.drain(1)
    stats = slow.stats()
    assert stats.num_free_pages == stats.num_pages
    assert len(one(slow, **SEEDED).token_ids) == 12


def live_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def test_a_deleted_model_leaves_nothing_behind():
    before, threads = live_bytes(), set(threading.enumerate())
    llm = serve()
    one(llm, **SEEDED)
    cache = llm.plan.kv_bytes
    assert live_bytes() - before > cache
    gone = weakref.ref(llm)
    del llm
    assert gone() is None, "nobody else holds on to it"
    assert live_bytes() == before
    assert set(threading.enumerate()) <= threads


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_gives_memory_back_and_wake_up_takes_it(level: int):
    with serve() as llm:
        said = one(llm, **SEEDED)
        awake = live_bytes()
        llm.sleep(level)
        llm.sleep(level)
        asleep = live_bytes()
        assert awake - asleep >= llm.plan.kv_bytes + (llm.plan.weight_bytes if level == 2 else 0)
        with pytest.raises(EngineError, match="wake_up"):
            one(llm, **SEEDED)
        llm.wake_up()
        llm.wake_up()
        assert abs(live_bytes() - awake) < 10_000, "but for a step's results"
        again = ask(llm, **SEEDED)
        assert again.outputs == [said]
        assert again.num_cached_tokens == 0, "the cache was given up"


def test_sleep_waits_for_nobody(slow: LLM):
    generation = slow.submit([7, 8, 9], SamplingParams(ignore_eos=True, max_tokens=50))
    with pytest.raises(EngineError, match="1 request"):
        slow.sleep()
    generation.abort()
    assert generation.result().outputs[0].finish_reason == "abort"


def test_shutdown_fails_what_runs_and_may_be_repeated(monkeypatch: pytest.MonkeyPatch):
    llm = dawdle(serve(), monkeypatch)
    generation = llm.submit([7, 8, 9], SamplingParams(ignore_eos=True))
    llm.shutdown()
    llm.shutdown()
    with pytest.raises(EngineError, match="shut down"):
        generation.result()
    for use in (lambda: one(llm), llm.stats, llm.reset_prefix_cache, lambda: llm.encode("a")):
        with pytest.raises(EngineError, match="shut down"):
            use()


def test_drain_waits_for_what_has_just_been_submitted(slow: LLM):
    generation = slow.submit([7, 8, 9], SamplingParams(ignore_eos=True, max_tokens=10))
    assert not slow.drain(0.0)
    assert slow.drain()
    assert generation.result().outputs[0].finish_reason == "length"


def test_clock_readings_are_in_order(llm: LLM):
    m = ask(llm, **SEEDED).metrics
    assert m is not None
    assert m.first_scheduled_time is not None
    assert m.first_token_time is not None
    assert m.finished_time is not None
    assert m.arrival_time <= m.first_scheduled_time <= m.first_token_time <= m.finished_time
