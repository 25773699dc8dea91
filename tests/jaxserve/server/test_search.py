"""Searches over HTTP, on a shipped model: answers, events, refusals, failures and hang-ups."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import httpx
import openai
import pytest

from jaxserve.llm import LLM
from jaxserve.searches import Running
from reasoning.controllers import CONTROLLERS
from reasoning.controllers.rebase import Rebase
from reasoning.controllers.self_consistency import SelfConsistency
from reasoning.pool import Fork
from reasoning.result import Budget
from tests.jaxserve.server.live_server import LiveServer, wait_until

MODEL = Path(__file__).parents[3] / "models/modchain-moe"
PROMPT = "12 9 2 4 5 :"
ASK: dict[str, Any] = {"model": "modchain", "messages": [{"role": "user", "content": PROMPT}]}
REBASE = {"controller": "rebase", "settings": {"width": 6}, "step": "|"}
ENDLESS = {"controller": "endless", "tokens": 10**6}


@dataclass(frozen=True)
class Endless:
    """Begins a new path as soon as one has ended, for as long as it is let."""

    period: int = 4
    name: ClassVar[str] = "endless"
    branching: ClassVar[bool] = False

    def start(self, view):
        return [Fork(i) for i in range(4)]

    def step(self, view):
        return [Fork(len(view.paths) + i) for i in range(4 - len(view.live))]

    def aggregate(self, view):
        return SelfConsistency.aggregate(self, view)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Failing(Endless):
    """Fails once it has seen something."""

    name: ClassVar[str] = "failing"

    def step(self, view):
        raise ZeroDivisionError("no way on")


@dataclass(frozen=True)
class FailingTree(Rebase):
    name: ClassVar[str] = "failing_tree"

    def observe(self, tree, grown):
        raise KeyError("left")


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    mine = {"endless": Endless, "failing": Failing, "failing-tree": FailingTree}
    with pytest.MonkeyPatch.context() as patch:
        for name, kind in mine.items():
            patch.setitem(CONTROLLERS, name, kind)
        llm = LLM(MODEL, progress=False, enable_route_noise=True, max_num_batched_tokens=64)
        llm.wait_until_warm()
        with LiveServer(llm, served_model_name="modchain") as server:
            yield server


@pytest.fixture
def client(live: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client
    is_idle(live)


def is_idle(live: LiveServer) -> None:
    """Nothing runs any more, and every page has come back."""
    wait_until(lambda: live.llm.stats().num_running == 0)
    wait_until(lambda: live.llm.stats().num_free_pages == live.llm.stats().num_pages)
    wait_until(lambda: live.state.gate.running == 0)


def searches() -> int:
    return sum(thread.name == "jaxserve-search" for thread in threading.enumerate())


def directly(live: LiveServer, controller: Any, **options: Any) -> Any:
    return live.llm.search(PROMPT, controller, Budget(tokens=4096), step="|", **options)


def test_a_chat_is_answered_by_a_search(live: LiveServer, client: openai.OpenAI):
    got = client.chat.completions.create(**ASK, extra_body={"search": REBASE})
    expected = directly(live, Rebase(width=6))
    found = got.model_dump()["search"]
    assert got.choices[0].message.content == live.llm.tokenizer.decode(expected.tokens)
    assert got.choices[0].finish_reason == "stop"
    assert found["answer"] == expected.answer
    assert found["distribution"] == pytest.approx(dict(expected.distribution))
    assert (found["controller"], found["mode"], found["stopped"]) == ("rebase", "off", "done")
    assert found["ledger"]["generated"] == expected.ledger.generated
    assert got.usage is not None
    assert got.usage.completion_tokens == expected.ledger.generated
    assert got.usage.prompt_tokens == len(live.llm.tokenizer.encode(PROMPT))


@pytest.mark.parametrize("controller", ["hyper", "self-consistency", "mcts"])
def test_a_completion_is_answered_by_a_search(client: openai.OpenAI, controller: str):
    search = {"controller": controller, "step": "|", "seed": 3}
    asked = {"model": "modchain", "prompt": PROMPT, "extra_body": {"search": search}}
    got, again = (client.completions.create(**asked) for _ in range(2))
    found = got.model_dump()["search"]
    assert got.choices[0].text.endswith(f"; {found['answer']} |")
    assert again.choices[0].text == got.choices[0].text
    assert again.model_dump()["search"]["distribution"] == found["distribution"]


def test_a_search_that_refines_tokens(client: openai.OpenAI):
    noise = {"K": 3, "entropy_gate": 0.0, "spared": 0}
    gen = {"max_tokens": 64, "route": noise}
    trees = {"controller": "rebase", "settings": {"width": 4, "gen": gen}, "step": "|"}
    often = {"gate": 0.0, "hysteresis": 0.0}
    settings = {"route": noise, "scores": often, "novelty": 2.0}
    pools = {"controller": "hyper", "settings": settings, "tokens": 60}
    for search in (trees, pools):
        got = client.chat.completions.create(**ASK, extra_body={"search": search})
        found = got.model_dump()["search"]
        spent = found["ledger"]
        assert 0 < spent["effective"] <= 2 * spent["generated"]
        if search is trees:
            assert found["answer"] is not None
            assert spent["effective"] == 2 * spent["generated"]


def test_speculation_changes_no_answer(client: openai.OpenAI):
    plain, ahead = (
        client.chat.completions.create(**ASK, extra_body={"search": REBASE | more})
        for more in ({}, {"speculate": "lossless"})
    )
    assert ahead.choices[0].message.content == plain.choices[0].message.content
    told = ahead.model_dump()["search"]
    assert told["mode"] == "lossless"
    assert told["distribution"] == plain.model_dump()["search"]["distribution"]
    ledger = told["ledger"]
    assert ledger["generated"] == ledger["committed"] + ledger["spec_waste"]


def test_a_budget_ends_it(client: openai.OpenAI):
    search = ENDLESS | {"tokens": 50}
    got = client.completions.create(model="modchain", prompt=PROMPT, extra_body={"search": search})
    assert got.choices[0].finish_reason == "length"
    assert got.model_dump()["search"]["stopped"] == "budget"
    assert got.usage is not None and got.usage.completion_tokens <= 50


def test_a_path_has_the_length_that_was_asked_for(client: openai.OpenAI):
    search = {"controller": "self-consistency", "settings": {"paths": 3}}
    got = client.completions.create(
        model="modchain", prompt=PROMPT, max_tokens=5, seed=1, extra_body={"search": search}
    )
    assert got.usage is not None and got.usage.completion_tokens == 15


def test_a_stream_tells_what_happens(live: LiveServer, client: openai.OpenAI):
    body = {"search": REBASE | {"speculate": "lossless"}}
    stream = client.chat.completions.create(
        **ASK, stream=True, stream_options={"include_usage": True}, extra_body=body
    )
    chunks = [chunk.model_dump() for chunk in stream]
    events = [chunk["search_event"] for chunk in chunks if chunk.get("search_event")]
    assert {"step", "score"} <= {event["kind"] for event in events}
    step = next(event for event in events if event["kind"] == "step")
    assert step["path"] == [[0, -1]] and step["tokens"] > 5 and step["text"].endswith("|")
    score = next(event for event in events if event["kind"] == "score")
    assert 0 <= score["score"] <= 1 and score["scorer"] == "prm"
    opening, *_, text, end, usage = chunks
    assert opening["choices"][0]["delta"]["role"] == "assistant"
    said = [c["choices"][0]["delta"]["content"] for c in chunks if c.get("search_event")]
    assert set(said) == {""}
    whole = client.chat.completions.create(**ASK, extra_body=body)
    assert text["choices"][0]["delta"]["content"] == whole.choices[0].message.content
    assert end["choices"][0]["finish_reason"] == "stop"
    assert end["search"]["answer"] == whole.model_dump()["search"]["answer"]
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] > 0


def test_the_model_may_be_asked_for_its_opinion(client: openai.OpenAI):
    scorer = {"question": "|", "yes": "4", "no": "9"}
    search = {"controller": "best-of-n", "settings": {"paths": 3}, "scorer": scorer}
    stream = client.completions.create(
        model="modchain", prompt=PROMPT, stream=True, extra_body={"search": search}
    )
    chunks = [chunk.model_dump() for chunk in stream]
    events = [chunk["search_event"] for chunk in chunks if chunk.get("search_event")]
    scores = {tuple(e["path"][0]): e for e in events if e["kind"] == "score"}
    assert len(scores) == 3 and {e["scorer"] for e in scores.values()} == {"self-evaluation"}
    assert all(0 < e["score"] < 1 for e in scores.values())
    assert chunks[-1]["search"]["ledger"]["scorer"] > 0


def test_a_stream_of_completions_has_their_shape(client: openai.OpenAI):
    stream = client.completions.create(
        model="modchain", prompt=PROMPT, stream=True, extra_body={"search": {"step": "|"}}
    )
    chunks = [chunk.model_dump() for chunk in stream]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text.endswith(f"; {chunks[-1]['search']['answer']} |")
    assert sum("search" in chunk for chunk in chunks) == 1


def test_what_is_no_search_says_nothing_of_one(live: LiveServer):
    got = httpx.post(f"{live.url}/v1/completions", json={"prompt": PROMPT, "max_tokens": 3})
    assert not {"search", "search_event"} & got.json().keys()


def of(controller: str, **settings: Any) -> dict[str, Any]:
    return {"search": {"controller": controller, "settings": settings}}


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        (of("nobody"), "search.controller"),
        (of("rebase", wide=1), "search.settings.wide"),
        (of("rebase", width="x"), "search.settings.width"),
        (of("rebase", width=0), "search.settings"),
        (of("rebase", width=10**7), "search.settings.width"),
        (of("rebase", gen=1), "search.settings.gen"),
        (of("hyper", route={"K": 0}), "search.settings.route"),
        (of("hyper", route={"tau": -1.0}), "search.settings.route"),
        (of("hyper", route={"spared": 2}), "search.settings.route"),
        (of("rebase", gen={"max_tokens": 0}), "search.settings.gen"),
        (of("rebase", gen={"max_tokens": 5, "top_q": 1}), "search.settings.gen.top_q"),
        (of("hyper", vote={"lenght": 1.0}), "search.settings.vote.lenght"),
        (of("beam", gen={"max_tokens": 9, "temperature": -1}), "search.settings.gen"),
        ({"search": {"tokens": 0}}, "search.tokens"),
        ({"search": {"tokens": "many"}}, "search.tokens"),
        ({"search": {"seconds": 0}}, "search.seconds"),
        ({"search": {"tokkens": 5}}, "search.tokkens"),
        ({"search": {"step": "| 5"}}, "search.step"),
        ({"search": {"controller": "beam"}}, "search.step"),
        ({"search": {"scorer": "nobody"}}, "search.scorer"),
        ({"search": {"scorer": "self-evaluation"}}, "search.scorer.no"),
        ({"search": {"scorer": {"yes": "4", "no": "4"}}}, "search.scorer.no"),
        ({"search": {"scorer": {"question": ""}}}, "search.scorer.question"),
        ({"search": {"scorer": {"ask": "?"}}}, "search.scorer.ask"),
        ({"search": {"speculate": "lossless"}}, "search.speculate"),
        ({"search": {"speculate": "wild"}}, "search.speculate"),
        ({"search": {"seed": 1}, "seed": 2}, "seed"),
        ({"search": {}, "n": 2}, "n"),
        ({"search": {}, "temperature": 0.5}, "temperature"),
        ({"search": {}, "stop": "|"}, "stop"),
        ({"search": {}, "logprobs": True}, "logprobs"),
        ({"search": {}, "max_tokens": 4000}, "max_tokens"),
        ({"search": {}, "guided_regex": "1+"}, "guided_regex"),
        ({"search": {}, "response_format": {"type": "json_object"}}, "response_format"),
        ({"search": {}, "tools": [TOOL], "tool_choice": "none"}, "tools"),
    ],
)
def test_mistakes_are_named(live: LiveServer, asked: dict[str, Any], param: str):
    answer = httpx.post(f"{live.url}/v1/chat/completions", json=ASK | asked)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert param.rpartition(".")[2][:6] in answer.json()["error"]["message"]  # "specul…"


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"prompt": [PROMPT, PROMPT]}, "prompt"),
        ({"echo": True}, "echo"),
        ({"logprobs": 0}, "logprobs"),
    ],
)
def test_completions_refuse_by_name(live: LiveServer, asked: dict[str, Any], param: str):
    body = {"prompt": PROMPT, "search": {}} | asked
    answer = httpx.post(f"{live.url}/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("name", "said"), [("failing", "ZeroDivisionError: no way on"), ("failing-tree", "'left'")]
)
def test_a_controller_that_fails_is_a_500_of_its_own(
    live: LiveServer, client: openai.OpenAI, name: str, said: str
):
    with client.chat.completions.create(
        **ASK, stream=True, extra_body={"search": ENDLESS}
    ) as other:
        running = iter(other)
        next(running)
        search = {"controller": name, "step": "|"}
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(**ASK, extra_body={"search": search})
        assert caught.value.status_code == 500
        assert said in caught.value.message
        with pytest.raises(openai.APIError, match="the search failed"):
            list(client.chat.completions.create(**ASK, stream=True, extra_body={"search": search}))
        plain = client.completions.create(model="modchain", prompt=PROMPT, max_tokens=4)
        assert plain.choices[0].text
        for _ in range(20):
            next(running)
    wait_until(lambda: searches() == 0)


@contextmanager
def posting(live: LiveServer, body: dict[str, Any]) -> Iterator[None]:
    """A request that is not streamed; leaving the block hangs up."""
    import socket
    from urllib.parse import urlsplit

    data, address = json.dumps(body).encode(), urlsplit(live.url)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(head.encode() + data)
        yield


def test_hanging_up_cancels_the_search(live: LiveServer, client: openai.OpenAI):
    stream = client.chat.completions.create(**ASK, stream=True, extra_body={"search": ENDLESS})
    for _ in range(10):
        next(iter(stream))
    assert searches() == 1
    stream.close()
    wait_until(lambda: searches() == 0)
    is_idle(live)
    with posting(live, ASK | {"search": ENDLESS}):
        wait_until(lambda: searches() == 1)
        wait_until(lambda: live.llm.stats().num_running > 0)
    wait_until(lambda: searches() == 0)
    is_idle(live)


def test_hanging_up_while_it_begins_leaves_no_search(live: LiveServer, monkeypatch):
    arrived, go = threading.Event(), threading.Event()
    real = live.llm.searches.step_tokens

    def slow(*args: Any) -> Any:
        arrived.set()
        assert go.wait(10)
        return real(*args)

    monkeypatch.setattr(type(live.llm.searches), "step_tokens", lambda self, *args: slow(*args))
    with posting(live, ASK | {"search": ENDLESS}):
        assert arrived.wait(10)
    wait_until(lambda: live.state.gate.running == 0)
    go.set()
    is_idle(live)
    assert searches() == 0


def test_a_draining_server_cuts_searches_off(live: LiveServer, client: openai.OpenAI):
    stream = client.chat.completions.create(**ASK, stream=True, extra_body={"search": ENDLESS})
    frames = iter(stream)
    next(frames)
    next(frames)
    live.state.gate.cut_off()
    with pytest.raises(openai.APIError, match="shutting down"):
        list(frames)
    wait_until(lambda: searches() == 0)


def test_many_searches_at_once_are_each_their_own(live: LiveServer, client: openai.OpenAI):
    seeds = range(6)
    alone = [directly(live, Rebase(width=6), seed=seed).answer for seed in seeds]
    found: dict[int, str] = {}

    def one(seed: int) -> None:
        body = {"search": REBASE | {"seed": seed}}
        got = client.chat.completions.create(**ASK, extra_body=body)
        found[seed] = got.model_dump()["search"]["answer"]

    threads = [threading.Thread(target=one, args=[seed]) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[seed] for seed in seeds] == alone


def test_metrics_count_searches(live: LiveServer, client: openai.OpenAI):
    def counted() -> float:
        lines = httpx.get(f"{live.url}/metrics").text.splitlines()
        found = [x for x in lines if "request_success_total" in x and '"stop"' in x]
        return float(found[0].split()[-1]) if found else 0.0

    before = counted()
    client.chat.completions.create(**ASK, extra_body={"search": REBASE})
    assert counted() == before + 1


def test_the_document_describes_searches(live: LiveServer):
    document = httpx.get(f"{live.url}/openapi.json").json()
    schemas = document["components"]["schemas"]
    assert {"SearchOptions", "SearchEvent", "SearchReport", "SearchLedger"} <= schemas.keys()
    assert "search" in schemas["ChatRequest"]["properties"]
    assert "search" in schemas["Completion"]["properties"]


def test_an_ended_search_can_be_cancelled():
    async def nothing() -> list[Any]:
        return []

    running = Running(nothing()).begin()
    assert running.result(5) == []
    running.cancel()
