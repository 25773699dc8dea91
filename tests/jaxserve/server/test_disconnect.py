"""A client that hangs up frees its request at the next step, whichever way it was waiting."""

import asyncio
import time

import httpx
import openai
import pytest

from tests.jaxserve.server.live_server import wait_until

LONG = {"model": "fake/model", "prompt": "x", "max_tokens": 4000, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4000, "ignore_eos": True}


def running(live):
    return live.llm.stats().num_running


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", LONG),
        ("/v1/completions", LONG | {"prompt": ["x", "y"], "n": 2}),
        ("/v1/completions", LONG | {"stream": True}),
        ("/v1/chat/completions", CHAT | {"stream": True}),
        ("/v1/responses", {"input": "x", "ignore_eos": True, "stream": True}),
    ],
)
def test_hanging_up_aborts(live, path, body):
    live.llm.delay = 0.005
    live.llm.script = lambda prompt: "x" * 3000
    with httpx.Client(base_url=live.url) as http:
        started = time.monotonic()
        with pytest.raises(httpx.ReadTimeout):
            if body.get("stream"):
                with http.stream("POST", path, json=body, timeout=1) as response:
                    lines = response.iter_lines()  # dropping it would close the response
                    next(lines)
                    assert running(live) == 1
                    raise httpx.ReadTimeout("seen enough")
            http.post(path, json=body, timeout=0.3)
    wait_until(lambda: running(live) == 0, timeout=2)
    assert time.monotonic() - started < 3
    assert len(live.llm.aborted) == (2 if body.get("n") else 1)


def test_the_openai_client_closes_a_stream(live):
    live.llm.delay = 0.005
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none") as client:
        stream = client.completions.create(**LONG_OPENAI, stream=True)
        next(iter(stream))
        stream.close()
        wait_until(lambda: running(live) == 0, timeout=2)
    assert len(live.llm.aborted) == 1


LONG_OPENAI = {
    "model": "fake/model",
    "prompt": "x",
    "max_tokens": 4000,
    "extra_body": {"ignore_eos": True},
}


def test_a_cancelled_task_aborts(live):
    live.llm.delay = 0.005

    async def main():
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as client:
            task = asyncio.ensure_future(client.completions.create(**LONG_OPENAI))
            while running(live) == 0:
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())
    wait_until(lambda: running(live) == 0, timeout=2)
    assert len(live.llm.aborted) == 1


def test_hanging_up_while_the_grammar_compiles_leaves_no_orphan(live):
    live.llm.submit_delay, live.llm.delay = 0.4, 0.005
    with httpx.Client(base_url=live.url) as http, pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json=LONG, timeout=0.1)
    wait_until(lambda: len(live.llm.submitted) == 1)
    wait_until(lambda: running(live) == 0, timeout=1)
    assert len(live.llm.aborted) == 1


def test_a_slow_grammar_delays_no_plain_request(live, http):
    real = live.llm.submit

    def submit(ids, params, **kwargs):
        time.sleep(0.6 if params.structured_outputs else 0)
        return real(ids, params, **kwargs)

    live.llm.submit = submit
    try:
        asyncio.run(_plain_beside_grammars(live.url))
    finally:
        del live.llm.submit


async def _plain_beside_grammars(url):
    async with httpx.AsyncClient(base_url=url, timeout=10) as http:
        slow = [
            asyncio.ensure_future(
                http.post("/v1/completions", json={"prompt": "x", "guided_regex": "a"})
            )
            for _ in range(6)
        ]
        await asyncio.sleep(0.1)
        started = time.monotonic()
        plain = await http.post("/v1/completions", json={"prompt": "x"})
        assert plain.status_code == 200
        assert time.monotonic() - started < 0.4
        assert {r.status_code for r in await asyncio.gather(*slow)} == {200}
